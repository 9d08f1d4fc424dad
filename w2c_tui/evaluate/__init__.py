"""The published benchmarks of Web2Code and local measures, over any backend.

from w2c_tui.evaluate import load_questions, run_wub, score_wub
from w2c_tui.evaluate import load_pages, run_wcgb, compare_runs
"""

from w2c_tui.evaluate.asking import Asker
from w2c_tui.evaluate.compare import Paired, compare_runs
from w2c_tui.evaluate.journal import Journal, Run, read_rows, read_run
from w2c_tui.evaluate.run_wcgb import by_model, from_folder, run_wcgb
from w2c_tui.evaluate.run_wub import run_wub
from w2c_tui.evaluate.wcgb import Page, PageResult, WcgbResult, load_pages
from w2c_tui.evaluate.wub import Answered, Question, WubResult, load_questions
from w2c_tui.evaluate.wub import score as score_wub

__all__ = [
    "Answered",
    "Asker",
    "Journal",
    "Page",
    "PageResult",
    "Paired",
    "Question",
    "Run",
    "WcgbResult",
    "WubResult",
    "by_model",
    "compare_runs",
    "from_folder",
    "load_pages",
    "load_questions",
    "read_rows",
    "read_run",
    "run_wcgb",
    "run_wub",
    "score_wub",
]
