"""Pages in a browser: the live preview, headless renders, and how near two pages are."""
