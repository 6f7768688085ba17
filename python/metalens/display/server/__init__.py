"""The viewer's server: the page of `metalens.viewer` with a model behind it, for the browser of this machine."""
