"""What one FX node is and does, whoever asks.

``values.py`` (its traced value, its module), ``targets.py`` (whose function it calls),
``normalize.py`` (one name and one set of arguments), ``autocast.py`` (autocast and grad mode that
change within a graph), ``effects.py`` (writes and random draws, as edges of order).
``fake_run.py`` runs a graph on tensors without memory. ``per_target.py`` remembers what is known of
a function as long as the function lives.
"""
