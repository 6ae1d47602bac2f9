"""The report that people look at: a network before and after its rewrite, as a page, on a terminal, or as JSON.

facts.py       what is told of a network, as data: sites, figures, comparison, manifest
histograms.py  the normalised inputs of each site, counted while normrewrite.diagnostics.moments reads them
document.py    these facts, the files that they are about, and the words for both
columns.py     the table by site, a column a row of it: heading, unit, meaning, text
picture.py     the network as blocks of nodes, from its graph
drawing.py     blocks, histograms and timings as SVG
svg.py         elements of SVG, escaped
html.py        the page: page.html.jinja and page.css
terminal.py    the same as text
"""
