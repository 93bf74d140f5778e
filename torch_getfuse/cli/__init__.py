"""The command line ``torch-getfuse``.

``main.py`` puts the commands together: start here. A command is a module: ``report_command.py``,
``plan_command.py``, ``run_command.py``, ``explain_command.py``, ``price_command.py``,
``verify_command.py``, ``sweep_command.py``, ``accelerators_command.py``, ``train_command.py``,
``bench_command.py``, ``completion_command.py``. They share ``command.py`` (what a command is),
``model_argument.py`` (MODEL), ``options.py`` (flags from the options of planning), ``output.py``
(``-o``, ``--json``, ``--open``) and ``completers.py`` (what a shell offers for an argument).

What a command computes with is imported where it runs, so that ``--help``, completion and mistakes
in the options need neither numpy nor torch.
"""
