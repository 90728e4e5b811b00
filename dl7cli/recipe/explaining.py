"""What the keys of a recipe mean and which values they may have, from where they are declared."""

from typing import Any

from dl7cli.recipe.files import Recipe
from dl7cli.recipe.section import Section

_BOUNDS = (
    ("minimum", "from {}"),
    ("exclusiveMinimum", "above {}"),
    ("maximum", "to {}"),
    ("exclusiveMaximum", "below {}"),
)


def explanations(recipe: Recipe) -> dict[str, str]:
    """Of each key of the recipe, `section.key`, what it means and its choices or bounds; also of those not set."""
    return dict(_explained(recipe, ""))


def _explained(section: Section, prefix: str) -> list[tuple[str, str]]:
    properties: dict[str, dict[str, Any]] = type(section).model_json_schema()["properties"]
    explained: list[tuple[str, str]] = []
    for name, schema in properties.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            explained += _explained(value, f"{prefix}{name}.")
        else:
            meaning = " ".join(schema.get("description", "").split())
            explained.append((f"{prefix}{name}", " ".join(filter(None, (meaning, _values(schema))))))
    return explained


def _values(schema: dict[str, Any]) -> str:
    """Which values a key may have, in brackets; nothing where any of its type will do."""
    [schema, *_] = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    if "enum" in schema:
        return f"[{' | '.join(map(str, schema['enum']))}]"
    if schema.get("type") == "boolean":
        return "[true | false]"
    bounds = [form.format(_written(schema[bound])) for bound, form in _BOUNDS if bound in schema]
    return f"[{' '.join(bounds)}]" if bounds else ""


def _written(bound: float) -> str:
    return f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"
