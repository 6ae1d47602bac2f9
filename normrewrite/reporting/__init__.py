"""The report that people look at: a network before and after its rewrite, as a page, on a terminal, or as JSON.

facts.py       what is told of a network, as data: sites, figures, comparison, manifest
histograms.py  the normalised inputs of each site, counted while normrewrite.diagnostics.moments reads them
document.py    these facts, the files that they are about, and the words for both
columns.py     the table by site, column by column: heading, unit, meaning, text
picture.py     the network as blocks of nodes, from its graph
drawing.py     blocks, histograms and timings as SVG
svg.py         elements of SVG, escaped
html.py        the page: page.html.jinja and page.css
printout.py    the same as a summary of lines and tables (normrewrite.results)
terminal.py    any summary on a terminal: tables, and colours by its verdicts
"""
