"""Plan files come from anyone: a damaged one is a PlanError, and what passes is true."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.cascade_simulator import Cascade, Way
from tests.graphs import Builder
from torch_getfuse.atomic_files import PART_PREFIX, replace_file, replace_text
from torch_getfuse.errors import PlanError
from torch_getfuse.options import Options
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.fusion_group import make_group
from torch_getfuse.partition.node_set import bits
from torch_getfuse.partition.plan import PartitionPlan, load_plan
from torch_getfuse.planner import plan_graph


def planned(buffer: int = 700, scheme: str = "lbdf") -> PartitionPlan:
    """Two branches, a strided convolution, in-place operators; one operator does not fit."""
    build = Builder()
    x = build.input((1, 4, 12, 12))
    stem = build.act(build.conv(x, 4, kernel=3))
    one, other = build.conv(stem, 4, kernel=3), build.act(build.conv(stem, 4))
    y = build.add(one, other)
    y = build.conv(y, 8, kernel=3, stride=2)
    build.conv(build.act(y), 40, kernel=3)
    options = {"buffer": buffer, "activation_bytes": 1, "weight_bytes": 1, "scheme": scheme}
    return plan_graph(build.graph(), Options.of(options))


def single_groups(plan: PartitionPlan) -> PartitionPlan:
    """The same operators, each a group of its own."""
    scheme = plan.make_scheme()
    unfusable = {plan.graph.index[name] for name in plan.unfusable}
    alone = [i for i in range(len(plan.graph)) if i not in unfusable]
    groups = tuple(make_group(scheme, 1 << i, plan.buffer_bytes) for i in alone)
    return replace(plan, groups=groups, lower_bound_bytes=0, proof=None, stages=())


# -- claims and proofs --------------------------------------------------------------------


def test_a_file_claims_what_a_search_has_proved(tmp_path: Path) -> None:
    plan = planned()
    assert (plan.proof, plan.claimed_by) == ("optimal", "")
    plan.save(tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.verify().claimed_by == "the plan file"
    assert loaded.verify(prove=True).claimed_by == ""


def test_a_false_proof_passes_as_a_claim_and_fails_to_be_proved() -> None:
    false = single_groups(planned())
    false = replace(false, lower_bound_bytes=false.dram_bytes, proof="optimal")
    loaded = PartitionPlan.from_dict(false.to_dict())
    assert loaded.verify().claimed_by == "the plan file"
    best = planned().dram_bytes
    with pytest.raises(PlanError, match=f"is wrong: a plan with {best} B of DRAM access exists"):
        loaded.verify(prove=True)


def test_a_bound_between_what_is_proved_and_the_plan_is_no_proof() -> None:
    plan = single_groups(planned())
    best = planned().dram_bytes
    assert best < plan.dram_bytes
    held = replace(plan, lower_bound_bytes=best, proof="bound")
    assert held.verify(prove=True).lower_bound_bytes == best
    with pytest.raises(PlanError, match="is wrong"):
        replace(held, lower_bound_bytes=best + 1).verify(prove=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower_bound_bytes": -1, "proof": "bound"}, "cannot be negative"),
        ({"lower_bound_bytes": 10**9, "proof": "bound"}, "above the plan's"),
        ({"lower_bound_bytes": 1, "proof": None}, "without a proof"),
        ({"lower_bound_bytes": 1, "proof": "optimal"}, "is called optimal"),
        ({"proof": "surely"}, "unknown proof"),
    ],
)
def test_impossible_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(planned(), stages=(), **changes).verify()


def test_a_stage_below_the_bound_is_refused() -> None:
    plan = planned()
    (stage, *_) = plan.stages
    wrong = replace(stage, dram_bytes=plan.lower_bound_bytes - 1)
    with pytest.raises(PlanError, match="less than the lower bound"):
        replace(plan, stages=(wrong,)).verify()


# -- order --------------------------------------------------------------------------------


def test_groups_stand_in_the_order_in_which_they_run() -> None:
    plan = single_groups(planned())
    turned = replace(plan, groups=plan.groups[::-1])
    with pytest.raises(PlanError, match=r"fusion group \d must run after fusion group \d"):
        turned.verify()
    form = turned.to_dict()
    with pytest.raises(PlanError, match="stands before it"):
        PartitionPlan.from_dict(form).verify()
    # Version 1 said nothing of their order.
    again = PartitionPlan.from_dict({**form, "schema_version": 1}).verify()
    assert sorted(again.groups, key=str) == sorted(plan.groups, key=str)


def test_an_unfusable_operator_listed_twice() -> None:
    plan = planned()
    assert len(plan.unfusable) == 1
    with pytest.raises(PlanError, match="listed twice"):
        replace(plan, unfusable=plan.unfusable * 2).verify()


# -- reading ------------------------------------------------------------------------------

NOT_INTEGERS = (True, 3.0, "3", None, [3], 10**40, -1)


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
@pytest.mark.parametrize(
    "place",
    [
        ("buffer_bytes",),
        ("activation_bytes",),
        ("dram_bytes",),
        ("lower_bound_bytes",),
        ("groups", 0, "buffer_bytes"),
        ("groups", 0, "dram_read_bytes"),
        ("stages", 0, "plans"),
        ("graph", "ops", 0, "weight_elements"),
        ("graph", "ops", 0, "reads", 0, "window", "stride", 0),
    ],
    ids=str,
)
def test_integers_are_not_coerced(place: tuple[Any, ...], value: object) -> None:
    form = planned().to_dict()
    _put(form, place, value)
    with pytest.raises(PlanError, match=str(place[-1]) if isinstance(place[-1], str) else "stride"):
        PartitionPlan.from_dict(form)


def test_what_is_no_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    good = json.dumps(planned().to_dict())
    for text, message in (
        ("[" * 100_000, "nested too deep"),
        (good.replace('"buffer_bytes": 700', '"buffer_bytes": ' + "9" * 5000), "damaged"),
        (good.replace('"buffer_bytes": 700', '"buffer_bytes": NaN'), "no number of JSON"),
        (good.replace('"method"', '"scheme"', 1), "twice in one object"),
        (good.replace('"stride": [2, 2]', '"stride": [0, 0]'), "not from 1 to"),
        (good.replace('"kernel": [3, 3]', f'"kernel": [{10**18}, 3]'), "kernel"),
        (good.replace('"conv', '"\\u001b[31mconv'), "not printable"),
        (good.replace('"conv', '"\\u202econv'), "not printable"),
        (good.replace('"scheme": "lbdf"', '"scheme": "mine"'), "cost model is not known"),
        ("null", "not an object"),
        ("{}", "schema_version"),
    ):
        assert text != good
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            load_plan(path).verify()
    with pytest.raises(PlanError, match="Is a directory"):
        load_plan(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_or_a_device_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(20)  # a read that waits would never end
    try:
        for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
            with pytest.raises(PlanError, match="no regular file"):
                load_plan(path)
    finally:
        signal.alarm(0)


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)  # a hole: it takes no room
    with pytest.raises(PlanError, match="is larger than"):
        load_plan(path)


def test_huge_maps_are_priced_at_once() -> None:
    """No file makes a check run for ever: sizes are bounded, and the cost does not follow them."""
    build = Builder()
    x = build.input((1, 1, 2**30, 2))
    build.act(build.conv(build.conv(x, 1, kernel=3), 1, kernel=5))
    options = {"buffer": "1MB", "activation_bytes": 1, "weight_bytes": 1}
    plan = plan_graph(build.graph(), Options.of(options))
    assert PartitionPlan.from_dict(plan.to_dict()).verify() == plan


# -- damage at random ---------------------------------------------------------------------


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a JSON value, the value itself excluded."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, item in items:
        found.append((*at, key))
        if isinstance(item, (dict, list)):
            found += _places(item, (*at, key))
    return found


def _at(form: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        form = form[key]
    return form


def _put(form: Any, place: tuple[Any, ...], value: object) -> None:
    _at(form, place[:-1])[place[-1]] = value


def _damaged(form: dict[str, Any], rng: Random) -> dict[str, Any]:
    form = copy.deepcopy(form)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(form)
        place, other = rng.choice(places), rng.choice(places)
        kind = rng.randrange(6)
        old = _at(form, place)
        if kind == 0:
            del _at(form, place[:-1])[place[-1]]
        elif kind == 1:
            _put(
                form, place, rng.choice((None, True, -1, 0, 1, 2.5, "x", [], {}, 10**30, "\x1b[2J"))
            )
        elif kind == 2:
            _put(form, place, copy.deepcopy(_at(form, other)))
        elif kind == 3 and isinstance(old, int):
            _put(form, place, old + rng.choice((-1, 1, 7, 2**40)))
        elif kind == 4 and isinstance(old, list):
            rng.shuffle(old)
        elif kind == 5 and isinstance(old, list) and old:
            old.append(copy.deepcopy(rng.choice(old)))
    return form


def _is_true(plan: PartitionPlan) -> bool:
    """Whether a plan is legal and its figures are right, by definitions of this test's own."""
    graph, scheme = plan.graph, plan.make_scheme()
    evaluator = Evaluator(scheme, plan.buffer_bytes)
    masks = [sum(1 << graph.index[name] for name in group.ops) for group in plan.groups]
    everything = [name for group in plan.groups for name in group.ops] + list(plan.unfusable)
    if sorted(everything) != sorted(op.name for op in graph):
        return False
    made = set(graph.inputs)
    left = {graph.index[name] for name in plan.unfusable}

    def run(operators: set[int]) -> None:
        for i in sorted(operators):
            if all(read.tensor in made for read in graph.ops[i].reads):
                made.add(graph.ops[i].writes)

    for group, mask in zip(plan.groups, masks, strict=True):
        run(left)
        run(set(bits(mask)))
        if any(graph.ops[i].writes not in made for i in bits(mask)):
            return False
        dram = scheme.dram(mask, plan.buffer_bytes)
        told = (group.dram_read_bytes, group.dram_write_bytes, group.dram_weight_bytes)
        if not evaluator.valid(mask) or told != tuple(dram):
            return False
        if group.buffer_bytes != scheme.buffer(mask, plan.buffer_bytes):
            return False
    return plan.lower_bound_bytes <= plan.dram_bytes


def _is_true_sequence(plan: PartitionPlan) -> bool:
    """The same of a cascade plan, by the simulator."""
    oracle = Cascade(
        plan.graph, plan.buffer_bytes, plan.activation_bytes, plan.weight_bytes, plan.slice_channels
    )
    names, steps = [], []
    for group in plan.groups:
        assert group.way is not None
        names += group.ops
        stays = sum(1 << plan.graph.index[name] for name in group.way.weights_stay)
        mask = sum(1 << plan.graph.index[name] for name in set(group.ops))
        steps.append((mask, Way(group.way.kind, group.way.count, stays)))
    runs = oracle.run_plan(steps, [resident.tensor for resident in plan.resident])
    return (
        sorted(names) == sorted(plan.graph.index)
        and oracle.lives([mask for mask, _ in steps]).items()
        >= {(r.tensor, (r.first, r.last)) for r in plan.resident}
        and [(run.buffer, run.read, run.write, run.weight) for run in runs]
        == [
            (g.buffer_bytes, g.dram_read_bytes, g.dram_write_bytes, g.dram_weight_bytes)
            for g in plan.groups
        ]
        and plan.lower_bound_bytes <= plan.dram_bytes
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": []}, "step 0 has no operator"),
        ({"ops": ["conv0", "conv0"]}, "'conv0' stands in step 0 twice"),
        ({"ops": ["nobody"]}, "the plan names 'nobody', which its graph has not"),
    ],
)
def test_operators_of_a_step(change: dict[str, Any], message: str) -> None:
    form = planned(scheme="cascade").to_dict()
    form["groups"][0].update(change)
    with pytest.raises(PlanError, match=message):
        PartitionPlan.from_dict(form).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor": "nowhere"}, "keeps 'nowhere' on chip, which its graph has not"),
        ({}, "lists '.*' twice among what stays on chip"),
        ({"first": 0, "last": 9}, "lists '.*' twice among what stays on chip"),
    ],
)
def test_tensors_that_are_said_to_stay(change: dict[str, Any], message: str) -> None:
    form = planned(2000, "cascade").to_dict()
    form["resident"].append({**form["resident"][0], **change})
    with pytest.raises(PlanError, match=message):
        PartitionPlan.from_dict(form).verify()


@pytest.mark.parametrize("scheme", ["brr", "cascade"])
def test_a_granularity_that_the_scheme_has_not(scheme: str) -> None:
    form = planned(scheme=scheme).to_dict()
    form["granularity"] = "pixel"
    told = f"states granularity 'pixel'; plans of scheme '{scheme}' have 'line'"
    with pytest.raises(PlanError, match=told):
        PartitionPlan.from_dict(form).verify()


@pytest.mark.parametrize("scheme", ["lbdf", "brr", "cascade"])
def test_operators_of_a_group_stand_in_the_order_in_which_they_run(scheme: str) -> None:
    form = planned(2000, scheme).to_dict()
    (k, group), *_ = [(k, g) for k, g in enumerate(form["groups"]) if len(g["ops"]) > 2]
    first, second = group["ops"][:2]
    group["ops"].reverse()
    kind = "step" if scheme == "cascade" else "fusion group"
    with pytest.raises(PlanError, match=f"{kind} {k} names .* before .*, which must run before it"):
        PartitionPlan.from_dict(form).verify()
    if scheme != "cascade":
        form["schema_version"] = 1  # which said nothing of any order
        assert PartitionPlan.from_dict(form).verify().groups[k].ops[:2] == (first, second)


def test_operators_that_do_not_wait_for_each_other_stand_in_any_order() -> None:
    """Branches have no order; only what runs before what it needs is wrong."""
    build = Builder()
    x = build.input((1, 4, 8, 8))
    build.add(build.conv(x, 4), build.conv(x, 4))
    options = Options(activation_bytes=1, weight_bytes=1)
    form = plan_graph(build.graph(), options).to_dict()
    one, other, both = form["groups"][0]["ops"]
    form["groups"][0]["ops"] = [other, one, both]
    assert PartitionPlan.from_dict(form).verify()


@pytest.mark.parametrize("name", ["resident", "residency", "slice_channels"])
def test_a_cascade_plan_states_what_its_steps_and_bound_follow_from(name: str) -> None:
    form = planned(scheme="cascade").to_dict()
    del form[name]
    with pytest.raises(PlanError, match=f"the file has no '{name}'"):
        PartitionPlan.from_dict(form)


def test_weights_of_no_element() -> None:
    form = planned().to_dict()
    op = next(op for op in form["graph"]["ops"] if not op["weight_elements"])
    op["weight_bytes"] = 5
    with pytest.raises(PlanError, match="states bytes of weights, but no weight_elements"):
        PartitionPlan.from_dict(form)


@pytest.mark.parametrize("change", [{"unfusable": ["nobody"]}, {"groups": ["nobody"]}])
def test_names_are_held_against_the_graph_before_a_plan_is_used(change: dict[str, Any]) -> None:
    plan = planned()
    if "groups" in change:
        first = replace(plan.groups[0], ops=("nobody",))
        change = {"groups": (first, *plan.groups[1:])}
    with pytest.raises(PlanError, match="'nobody'"):
        replace(plan, **change).check_graph(plan.graph)


@pytest.mark.parametrize("scheme", ["lbdf", "brr", "cascade"])
def test_damaged_at_random(scheme: str) -> None:
    form, rng, passed, refusals = planned(scheme=scheme).to_dict(), Random(0), 0, []
    for _ in range(500):
        damaged = _damaged(form, rng)
        try:
            plan = PartitionPlan.from_dict(json.loads(json.dumps(damaged))).verify()
        except PlanError as error:
            refusals.append(str(error))
            continue
        assert _is_true_sequence(plan) if plan.scheme == "cascade" else _is_true(plan)
        assert str(plan).replace("\n", "").isprintable()
        passed += 1
    assert all(map(str.isprintable, refusals))
    assert 5 < passed < 250, "some damage is harmless, most is not"


# -- writing ------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    path.chmod(0o640)

    def fail(part: Path) -> None:
        part.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
    replace_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_devices_and_missing_folders(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    replace_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    replace_text("/dev/null", "nothing")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="none") as raised:
        replace_text(tmp_path / "none" / "file", "text")
    assert PART_PREFIX not in str(raised.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_plan_survives_a_kill_while_it_is_saved(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.json", planned()
    plan.save(path)
    for _ in range(10):
        child = os.fork()
        if child == 0:
            while True:
                plan.save(path)
        # Until the child is at work: it has left a file that it was writing, or replaced ours.
        before = path.stat().st_ino
        while path.stat().st_ino == before:
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert load_plan(path) == plan
