"""The command line ``torch-getfuse``: ``main.py`` has its commands, ``options.py`` their flags,
``run_command.py`` and ``accelerators_command.py`` the commands ``run`` and ``accelerators``.
"""
