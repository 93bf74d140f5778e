"""The interactive page of a report: one HTML file that fetches nothing.

``figures.py`` turns a section of a report into the plain values that the page shows: start here.
``page.py`` puts them, styles and scripts into one file, beside the report's own tables for readers
without scripts. ``static/`` has the page's template, style and scripts in the order of
``page.SCRIPTS``, and the libraries that draw and zoom the graph (``make html-libraries`` bundles
them again; their licences lie beside them).
"""
