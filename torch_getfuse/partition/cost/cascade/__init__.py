"""Cascade: tensors that stay on chip, weights that stream (docs/method.md, section 12).

``model.py`` is the cost model: open it first. ``way.py`` has the records that plans keep,
``groups.py`` what is known of a set of operators, ``shape.py`` its schedules in units,
``pricing.py`` the best of the three ways beside residents, ``weights.py`` which weights stay,
``layout.py`` the storages of a step as it runs. For the executor, ``step_layout.py`` has the form
in which it is told where tensors lie, and ``stripe_schedule.py`` the order of turns in stripes. In:
a set of operators, and what is resident. Out: the way, its buffer and its traffic.
"""
