"""HTML that is escaped by construction: text is escaped unless it is already markup."""

import math
from collections.abc import Collection, Iterable, Sequence
from html import escape

UNKNOWN = "–"
_VOID = frozenset({"br", "hr", "img", "meta"})


class Markup(str):
    """Text that is HTML already; :func:`tag` escapes every other string."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Markup:
    """Return one element. ``class_`` means ``class``, ``aria_label`` means ``aria-label``."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Markup:
    """Return the parts in sequence, each escaped unless it is markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts))


def paragraph(*children: str, class_: str = "") -> Markup:
    """Return a paragraph."""
    return tag("p", *children, class_=class_) if class_ else tag("p", *children)


def box(title: str, *children: str, kind: str = "note") -> Markup:
    """Return a framed remark; ``kind`` is ``note`` or ``warning``."""
    return tag("aside", tag("strong", title), paragraph(*children), class_=f"box {kind}")


def section(title: str, *children: str) -> Markup:
    """Return a section with its heading, or nothing if it has no content."""
    return tag("section", tag("h2", title), *children) if any(children) else Markup()


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,), caption: str = ""
) -> Markup:
    """Return a table that scrolls sideways by itself on a narrow screen.

    Args:
        header: The column names.
        rows: The cells; a row's first cell names it.
        left: Columns of words; the others hold numbers and are set flush right.
        caption: What the table shows.
    """

    def cells(values: Sequence[str], first: str, rest: str, scope: str) -> Markup:
        return tag(
            "tr",
            *(
                tag(
                    rest if column else first,
                    value,
                    class_="words" if column in left else "number",
                    **({} if column and rest == "td" else {"scope": scope}),
                )
                for column, value in enumerate(values)
            ),
        )

    head = tag("thead", cells(header, "th", "th", "col"))
    body = tag("tbody", *(cells(row, "th", "td", "row") for row in rows))
    title = tag("caption", caption) if caption else Markup()
    return tag(
        "div",
        tag("table", title, head, body),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or header[0],
    )


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return "∞" if math.isinf(value) else f"{value:,.{digits}f}"


def count(value: int | None) -> str:
    """Return a whole number with thousands separated; a dash where there is none."""
    return UNKNOWN if value is None else f"{value:,}"


def epsilon_text(value: float) -> str:
    """Return an epsilon to two decimals, never rounded in the favour of the one who states it."""
    return number(value if math.isinf(value) else math.ceil(round(value * 100, 6)) / 100, 2)


def duration(seconds: float | None) -> str:
    """Return a time span in the unit that fits it."""
    if seconds is None:
        return UNKNOWN
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
