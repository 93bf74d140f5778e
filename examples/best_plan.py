"""Which operators to run together: the best plan, by hand and by the package, and as a program.

`group_cost.py` says what a fusion group costs. Groups run one after another; here is how to find
the groups with the least DRAM access that all fit the buffer, and to know that they are the best.
"""

import torch
from torch import nn

import torch_getfuse
from torch_getfuse.backend.capture.capture import capture_model
from torch_getfuse.ir import OpGraph
from torch_getfuse.partition.cost.lbdf.model import Lbdf
from torch_getfuse.partition.cost.scheme import Evaluator
from torch_getfuse.partition.exact.down_sets import exact
from torch_getfuse.partition.node_set import bits, is_connected, neighbours
from torch_getfuse.partition.problem import FusionProblem


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'-' * len(text)}")


# 1. A network -----------------------------------------------------------------------------
# Fire modules, the blocks of SqueezeNet: narrow, widen in two ways, put both beside each other.


class Fire(nn.Module):
    """Maps of ``(N, 32, H, W)`` to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.expand1 = nn.Conv2d(8, 16, 1)
        self.expand3 = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.squeeze(x).relu()
        return torch.cat([self.expand1(narrow).relu(), self.expand3(narrow).relu()], 1)


torch.manual_seed(0)
model = nn.Sequential(Fire(), Fire()).eval()
x = torch.randn(1, 32, 16, 16)
graph: OpGraph = capture_model(model, (x,)).graph
evaluator = Evaluator(Lbdf(graph, "line", activation_bytes=1, weight_bytes=1), 6 * 1024)


# 2. Every legal plan ----------------------------------------------------------------------
# After each group, what has run is a down-set: a set of operators that holds every producer of
# its members. So a plan is a chain of down-sets from nothing to all, and each step between two
# of them is a group. This network is almost a chain: it has few.


def down_sets(graph: OpGraph) -> list[int]:
    """All of them as bit masks, small ones first."""
    found, front = {0}, [0]
    while front:
        done = front.pop()
        for i, needs in enumerate(graph.predecessors):
            grown = done | 1 << i
            if not needs & ~done and grown not in found:
                found.add(grown)
                front.append(grown)
    return sorted(found, key=int.bit_count)


heading("Down-sets")
sets = down_sets(graph)
print(f"{len(sets)} of {2 ** len(graph)} sets of operators are down-sets")


# 3. The best plan -------------------------------------------------------------------------
# The cheapest chain, by dynamic programming over the down-sets. Nothing legal is left out, so
# the result is the optimum, and the proof is the program.

near = neighbours(graph)
best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
for upper in sets[1:]:
    for lower in sets:
        group = upper & ~lower
        if lower & ~upper or not group or lower not in best:
            continue
        if is_connected(group, near) and evaluator.valid(group):
            cost = best[lower][0] + evaluator.dram(group)
            if upper not in best or cost < best[upper][0]:
                best[upper] = cost, [*best[lower][1], group]

heading("The best plan")
cost, groups = best[sets[-1]]
for group in groups:
    names = ", ".join(graph.ops[i].name for i in bits(group))
    print(f"{evaluator.buffer(group):6} B of buffer: {names}")
unfused = sum(evaluator.dram(1 << i) for i in range(len(graph)))
print(f"{cost} B of DRAM access, against {unfused} B with every operator alone")
assert cost == exact(FusionProblem(evaluator)).dram_bytes  # it grows connected sets only: faster

# The same through the front door, with its report:

plan = torch_getfuse.plan(model, (x,), buffer="6KB", activation_bytes=1, weight_bytes=1)
assert plan.dram_bytes == plan.verify().lower_bound_bytes == cost
heading("The report")
print(torch_getfuse.report(plan))


# 4. The plan as a program -----------------------------------------------------------------
# The plan becomes an FX module with one child per group. torch.compile runs it in place of the
# model, here with the plan that was made above; without one, the backend makes its own.

heading("One submodule per fusion group")
split = torch_getfuse.split(model, (x,), plan)
for name, child in split.named_children():
    print(f"{name}: {[node.name for node in child.graph.nodes if node.op.startswith('call')]}")
compiled = torch.compile(model, backend="getfuse", options={"plan": plan})
with torch.no_grad():
    assert torch.equal(compiled(x), model(x))
print("compiled, its output equals the model's, bit for bit")
