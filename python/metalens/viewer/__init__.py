"""The viewer's page: one HTML file that shows readings, layers by tokens, in any browser and in notebooks. It needs no network."""
