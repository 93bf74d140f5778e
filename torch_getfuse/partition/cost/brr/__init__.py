"""BRR: buffer requirement reduction, after Optimus (docs/method.md, section 4).

``model.py`` prices a group: open it first. ``starts.py`` chooses which first operators are full and
which partial; ``rows.py`` has the rows that the sinks of a group ask of the operators above them.
"""
