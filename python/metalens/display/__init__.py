"""Results for people: tables, figures and the format of numbers. Labels live here; data has snake_case names."""
