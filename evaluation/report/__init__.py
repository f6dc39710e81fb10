"""A report on one or several runs: one HTML page without references to other files or to the network.

`run_record` reads a run folder, `curves` chooses what is drawn, `chart` draws it as SVG, `pictures` embeds images, `sections`
writes the parts of the page, and `page` puts them together.
"""
