"""The application with an engine that sends prepared pieces; started by `bench_tui`."""

from __future__ import annotations

import io
import sys
from typing import Any

from textual.binding import Binding

from tests.bench.bench_tui import PAGE
from tests.tui.scripted import ScriptedEngine
from w2c_tui.core.config import Settings, paths
from w2c_tui.core.conversation import Message
from w2c_tui.core.image import attachment_from_bytes
from w2c_tui.core.store import Store
from w2c_tui.tui.app import W2CApp


class Scripted(W2CApp):
    """With one key more, which runs the scenario."""

    BINDINGS = [Binding("ctrl+f5", "scenario", priority=True)]  # noqa: RUF012

    scenario = ""

    async def action_scenario(self) -> None:
        screen: Any = self.screen
        if self.scenario == "open":
            await screen.open_session(self.store.sessions("LASTMESSAGE")[0].id)
        else:
            self.run_worker(self._thousand())

    async def _thousand(self) -> None:
        import asyncio

        from PIL import Image

        screen: Any = self.screen
        for turn in range(500):
            if turn < 200:
                buffer = io.BytesIO()
                Image.new("RGB", (1280, 800), (turn, 90, 255 - turn)).save(buffer, "PNG")
                screen.composer.add_picture(
                    attachment_from_bytes(buffer.getvalue(), f"shot-{turn}.png")
                )
            screen.prompt.put(f" Question {turn}")
            screen.prompt.action_send()
            await asyncio.sleep(0)
            while len(screen.transcript.messages) < 2 * turn + 2 or self.answers:
                await asyncio.sleep(0.005)
        self.sub_title = "done"
        screen.prompt.text = "ALLDONE"


def main() -> None:
    scenario, *arguments = sys.argv[1:]
    settings = Settings(ocr="off")
    with Store.open(paths().sessions) as store:
        if scenario == "open":
            session = store.create_session("LASTMESSAGE")
            for turn in range(250):
                store.add_message(session.id, Message("user", f"Question {turn}"))
                text = f"Answer *{turn}*:\n\n```html\n{PAGE[:1500]}\n```\n\nThat is all.\n"
                if turn == 249:
                    text += "\nLASTMESSAGE"
                with store.begin_answer(session.id) as answer:
                    answer.append(text)
                    answer.finish()
        text = PAGE if scenario == "stream" else f"Here:\n\n```html\n{PAGE[:1500]}\n```\nDone.\n"
        rate = float(arguments[0]) if arguments else 0.0
        engine = ScriptedEngine(text, rate)
        app = Scripted(settings, paths(), store, engine=engine, new=True)
        app.scenario = scenario
        app.run()


if __name__ == "__main__":
    main()
