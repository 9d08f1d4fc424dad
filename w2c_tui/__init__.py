"""w2c-tui: a screenshot of a web page becomes its code, on your own machine."""

__version__ = "0.1.0"
