"""The least a Textual chat could be: Markdown, a text area and a footer. Only for comparison."""

from textual.app import App, ComposeResult
from textual.widgets import Footer, Markdown, TextArea


class Bare(App[None]):
    def compose(self) -> ComposeResult:
        yield Markdown("# Hello\n\nSome *text*.")
        yield TextArea()
        yield Footer()


if __name__ == "__main__":
    Bare().run()
