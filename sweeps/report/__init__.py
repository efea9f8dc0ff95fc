"""Report of a sweep: its runs compared, as HTML, Markdown, CSV and in W&B."""
