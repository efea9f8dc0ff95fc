"""Hook of mkdocs: links of pages to files of the repository outside docs/, which the site does not hold."""

import posixpath
import re


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Return the page with such links as links to the repository, or as names of files where it has no address."""

    def replaced(match: re.Match) -> str:
        text, link = match.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link))
        if "://" in link or link.startswith("#") or path.startswith("docs/"):
            return match[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else f"{text} (`{path}`)"

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)]+)\)", replaced, markdown)
