"""What the comparison of plans on an idle and a busy machine says of its runs."""

from __future__ import annotations

import pytest

from benchmarks.loaded import busy, differing, in_a_process


def test_plans_that_differ_are_told_apart_by_the_clock() -> None:
    def run(*digests: str, clock: str = "") -> dict[str, dict[str, object]]:
        keys = zip(("lbdf 64", "brr 64", "brr 256"), digests, strict=True)
        return {key: {"digest": digest, "clock": key == clock} for key, digest in keys}

    alone = run("a", "b", "c")
    assert differing([alone, alone, alone]) == ([], [])
    assert differing([alone, run("a", "x", "c"), alone]) == ([], ["brr 64"])
    assert differing([alone, alone, run("a", "x", "y", clock="brr 64")]) == (
        ["brr 64"],
        ["brr 256"],
    )


def test_the_busy_loops_end_with_the_runs() -> None:
    with busy(1) as loops:
        assert [loop.poll() for loop in loops] == [None]
    assert loops[0].poll() is not None


def test_a_model_that_cannot_be_planned_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"^torchvision:nothing: .*no model 'nothing'") as caught:
        in_a_process("torchvision:nothing", ["lbdf"], [64])
    assert "Traceback" not in str(caught.value)
