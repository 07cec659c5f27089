"""report.html: the page, its pictures, plots and warnings."""
