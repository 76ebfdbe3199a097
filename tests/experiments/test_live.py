"""The terminal while runs are under way."""

import io
from pathlib import Path

from rich.console import Console

from ds_optforge.experiments.launching import Record, Run
from ds_optforge.experiments.live import Board, last_row

RUN = Run("W-2", {}, seed=1, steps=200)


def record(folder: Path, **more: object) -> Record:
    values = {"name": "W-1", "seed": 0, "steps": 200, "status": "finished", "reason": "", "seconds": 12.0, "commit": "c"}
    return Record(**{**values, "command": [], "measured": {"validation_loss": 2.5}, "folder": folder, **more})  # type: ignore[arg-type]


def shown(board: Board) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(board.render())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_run_under_way_is_shown_with_its_last_row(tmp_path: Path) -> None:
    board = Board("sweep", "validation_loss", Console(file=io.StringIO()))
    board.stage("Phase 1")
    board.started(RUN, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 49, "loss": 9}\n{"step": 50, "loss": 3.25, "tokens_per_second": 4321}\n{"st'
    )
    line = next(line for line in shown(board).splitlines() if "W-2" in line)
    assert all(text in line for text in ("50/200", "3.2500", "4,321"))
    assert "Phase 1" in shown(board)


def test_an_ended_run_moves_to_the_latest(tmp_path: Path) -> None:
    board = Board("sweep", "validation_loss", Console(file=io.StringIO()))
    board.started(RUN, tmp_path)
    board.ended(record(tmp_path), reused=False)
    board.ended(record(tmp_path / "b", status="crashed", reason="exit status 1"), reused=False)
    board.ended(record(tmp_path / "c"), reused=True)
    text = shown(board)
    assert "W-2" not in text
    assert "2 runs ended, 1 found finished, 0 under way" in text
    assert "validation_loss 2.5000" in text
    assert "exit status 1" in text


def test_the_time_that_is_left_is_estimated_from_what_runs_have_taken(tmp_path: Path) -> None:
    """12 seconds each: five that have not started and one that has just begun, two at a time."""
    board = Board("sweep", "validation_loss", Console(file=io.StringIO()), parallel=2)
    board.expect(7)
    board.started(RUN, tmp_path)
    assert "1 under way, 6 more at most\n" in shown(board).replace(" \n", "\n")
    board.ended(record(tmp_path / "b"), reused=True)
    assert "1 under way, 5 more at most; about 0:00:36 left" in shown(board)


def test_without_a_terminal_each_event_is_a_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    with Board("sweep", "validation_loss", console) as board:
        board.started(RUN, tmp_path)
        board.ended(record(tmp_path), reused=False)
        board.decided("W-1: keep")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == [
        f"  W-2, seed 1: started, 200 steps ({tmp_path})",
        "  W-1, seed 0: finished after 12 s; validation_loss 2.5000",
        "W-1: keep",
    ]


def test_on_a_terminal_the_view_is_drawn_and_leaves_nothing_behind(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Board("the sweep", "validation_loss", console) as board:
        board.started(RUN, tmp_path)
        board._live.refresh()
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the sweep" in drawn
    assert "0/200" in drawn


def test_there_is_no_last_row_before_the_first_step(tmp_path: Path) -> None:
    assert last_row(tmp_path) == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    assert last_row(tmp_path) == {}
