"""Shows the configuration of a recipe, and what every key means. No data are read, and nothing is trained or written.

cskd-jax config show RECIPE[:WORD] [--config.KEY=VALUE ...]
cskd-jax config keys [PATTERN]

  show       the value of every key that `cskd-jax train` would run with, after all checks that need no data; * marks
             what differs from the default, which follows it. For cifar100_standard and tiny_imagenet_standard, also
             where every value was published, and what the method uses in other recipes.
  keys       default, allowed values and meaning of every key, including those of the losses; with PATTERN, only of the
             keys that contain it, or match it if it has a *: optimizer, temperature, losses.kd, "*.width"

`python -m cskd_jax config` is the same command.

Exit codes: 0 done; 2 something to fix in the command or the configuration.
"""

import fnmatch
import textwrap

from cskd_jax.commands import command_line
from cskd_jax.errors import UserError, close_to

_ACTIONS = ("show", "keys")


def main(argv: list[str]) -> int:
    """Parses the command line, prints, and returns the exit code."""
    return command_line.run_program(_run, __doc__, argv)


def _run(argv):
    if not set(_ACTIONS) & set(argv[1:]):
        raise UserError(f"config must be followed by show or keys, such as cskd-jax config {_meant(argv[1:])}")
    if argv[1] == "keys":
        if any(word.startswith("-") or "=" in word for word in argv[2:]) or len(argv) > 3:
            example = _pattern(argv[2:]) or "optimizer"
            raise UserError(f"config keys takes one pattern and no recipe, such as cskd-jax config keys {example}")
        print(explain("".join(argv[2:])))
        return
    parser = command_line.Parser(takes_config=True, advice=command_line.ADVICE_FOR_ONE_RUN)
    values = parser.parse(argv)
    if values.words[:1] != ["show"]:
        raise UserError("config must be followed by show or keys, such as cskd-jax config show digits:kd")
    values.words.pop(0)
    print(show(parser.recipe(values), values.overrides))


def _meant(words):
    """Returns what was meant by words without show or keys."""
    from cskd_jax.runs.recipes import packaged_recipes

    close = close_to(words[0], _ACTIONS) if words else []
    if close:
        return " ".join([close[0], *words[1:]])
    recipe = next((word for word in words if word.partition(":")[0] in packaged_recipes()), None)
    if recipe is not None:
        return f"show {recipe}"
    pattern = _pattern(words)
    return f"keys {pattern}" if pattern else "show digits:kd"


def _pattern(words):
    """Returns the first key or section in words that are written as flags, or "" if there is none."""
    from cskd_jax.runs import keys

    known = {part for path in keys.KEYS for part in (path, *path.split("."))}
    names = [word.lstrip("-").partition("=")[0].removeprefix("config.").replace("-", "_") for word in words]
    return next((name for name in names if name in known), "")


def show(recipe: str, overrides: list[str]) -> str:
    """Returns the configuration of a recipe as text, a line for every key.

    Args:
      recipe: RECIPE or RECIPE:WORD.
      overrides: Arguments --config.KEY=VALUE.

    Raises:
      UserError: There is no such recipe, or the configuration is wrong.
    """
    from cskd_jax.runs import keys, recipes, schema
    from cskd_jax.runs.keys import REQUIRED
    from cskd_jax.runs.loss_keys import loss_keys
    from cskd_jax.runs.workdir import default_workdir

    config = recipes.load_checked(recipe, overrides)
    schema.validate(config)
    values = schema.flatten(config)
    known = dict(keys.KEYS)
    for name in sorted(config.losses):
        known |= {f"losses.{name}.{setting}": key for setting, key in loss_keys(name).items()}
    rows = []
    for path in known:
        default = known[path].default
        differs = values[path] != default
        note = f"(default {_value(default)})" if differs and default is not REQUIRED else ""
        rows.append(("*" if differs else " ", path, _value(values[path]), note))
    width, value_width = (max(len(row[column]) for row in rows) for column in (1, 2))
    lines = [f"{mark} {path:{width}}  {value:{value_width}}  {note}".rstrip() for mark, path, value, note in rows]
    lines += ["", "* marks a value that differs from the default of its key, which follows it."]
    return "\n".join([f"{recipe}, workdir {default_workdir(recipe, config)}", "", *lines, *_sources(recipe, values)])


def _sources(recipe, values):
    """Returns the lines that say where the values of a recipe were published; none for most recipes."""
    import ml_collections

    from cskd_jax.configs import methods
    from cskd_jax.runs import recipes, schema

    sources = recipes.load_sources(recipe)
    if not sources:
        return []
    published = schema.flatten(recipes.load_recipe(recipe, []))
    try:
        losses = methods.losses(values["method"])
    except ValueError:  # The recipe has a method of its own, or one for multi-label data.
        losses = {}
    usual = schema.flatten(schema.fill(ml_collections.ConfigDict({"losses": losses})))
    elsewhere = {key: value for key, value in usual.items() if key.startswith("losses.")}
    width, lines = max(map(len, sources)), []
    for source in dict.fromkeys(sources.values()):
        lines += ["", f"published in {source}:"]
        for key in (key for key in sources if sources[key] == source):
            notes = [f"changed to {_value(values[key])}"] if values[key] != published[key] else []
            if key in elsewhere and elsewhere[key] != published[key]:
                notes.append(f"in other recipes {_value(elsewhere[key])}")
            lines.append(f"  {key:{width}}  {_value(published[key])}" + (f"  ({'; '.join(notes)})" if notes else ""))
    return lines


def explain(pattern: str) -> str:
    """Returns a description of the keys that contain a text or match a pattern with *; of all keys for "".

    Raises:
      UserError: No key matches.
    """
    from cskd_jax.losses import LOSSES
    from cskd_jax.runs import keys, schema
    from cskd_jax.runs.keys import REQUIRED
    from cskd_jax.runs.loss_keys import common_keys, loss_keys

    common = common_keys()
    found = dict(keys.KEYS)
    # The settings that every loss has are shown once, unless the pattern is about one loss.
    found |= {f"losses.NAME.{setting}": key for setting, key in common.items()}
    for name in sorted(LOSSES):
        found |= {f"losses.{name}.{s}": key for s, key in loss_keys(name).items() if pattern or s not in common}
    shown = [path for path in found if fnmatch.fnmatchcase(path, pattern if "*" in pattern else f"*{pattern}*")]
    if not shown:
        close = schema.close_keys(pattern, found)
        sections = dict.fromkeys(path.partition(".")[0] for path in found)
        hint = f"did you mean {' or '.join(close)}?" if close else f"all keys begin with {', '.join(sections)}"
        raise UserError(f"no key matches {pattern}; {hint}")
    entries = []
    for path in shown:
        key = found[path]
        default = "required" if key.default is REQUIRED else f"default {_value(key.default)}"
        lines = textwrap.wrap(f"{default}; {key.rule.allowed}", 100) + textwrap.wrap(key.meaning, 100)
        entries.append("\n".join([path, *(f"    {line}" for line in lines)]))
    return "\n".join(entries)


def _value(value):
    """Returns a value as it is typed in --config.KEY=VALUE."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"({','.join(map(repr, value))}{',' * (len(value) == 1)})" if isinstance(value, tuple) else str(value)
