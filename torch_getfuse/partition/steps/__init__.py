"""The search for a sequence of steps with tensors that stay on chip (docs/method.md, section 12).

``problem.py`` says what is given, ``lattice.py`` grows the steps between down-sets and bounds what
is left, ``search.py`` is the dynamic program over down-sets and residents, ``optimum.py`` puts them
together: open it first. ``check.py`` holds a plan to the rules, ``layouts.py`` tells the executor
where its tensors lie, ``reasons.py`` says why tensors do not stay. In: a graph, the cascade cost
model, a buffer. Out: the optimum with its proof, or a good plan and a bound.
"""
