"""Recipes from tables of published settings, stored as data with a source for every value.

A table is a JSON file next to its recipe. It contains `protocol`, which applies to every cell; `pairs`, the published
pairs, the first of which is used when only a method is given; `networks`, the names that may form a pair; and
`methods`, with values for single pairs where those were published. Settings are keys of docs/configuration.md. A method
that is not in a table keeps its weights from configs/methods.py.
"""

from ml_collections import ConfigDict

from cskd_jax.configs import methods, networks


def config_of(table, word):
    """Returns the configuration of a cell.

    Args:
      table: Content of the JSON file.
      word: TEACHER/STUDENT/METHOD, or METHOD alone.
    """
    return _cell(table, word)[0]


def sources_of(table, word):
    """Returns {key: where its value was published} for a cell; the arguments are the same as for `config_of`."""
    config, settings = _cell(table, word)
    return {key: source for key, (value, source) in settings.items() if _value(config, key) == value}


def _cell(table, word):
    """Returns the configuration of a cell, and the settings in the table that lead to it: {key: (value, source)}."""
    first_teacher, first_student = (networks.network(name) for name in table["pairs"][0].split("/"))
    *pair, method = networks.split_word(word, first_teacher, first_student)
    pair = [_name_in_table(table, network) for network in pair]
    settings = _settings(table, pair, method)
    config = ConfigDict({"method": method, "teacher": {}, "student": {}})
    config.losses = methods.losses(method, changes=_changes(table, pair, method))
    config.first_phase = methods.first_phase(method, table["protocol"]["first_phase_epochs"])
    if not pair[1].startswith(tuple(table["protocol"]["first_phase_with_own_rate"])):
        config.first_phase.learning_rate = None  # The optimizer's learning rate.
    for role, name in zip(("teacher", "student"), pair, strict=True):
        config[role].name, config[role].width = _network(table, name)
    for key, (value, _) in settings.items():
        if not key.startswith("losses.") or method in table["methods"]:
            _set(config, key, tuple(value) if isinstance(value, list) else value)
    return config, settings


def _settings(table, pair, method):
    """Returns {key: (value, source)} for the protocol, the student, and the methods of a sum."""
    protocol, rate = table["protocol"], table["networks"][pair[1]].get("learning_rate")
    found = {key: (value, protocol["source"]) for key, value in protocol["settings"].items()}
    if rate is not None:
        found["optimizer.learning_rate"] = rate, f"{protocol['source']}, for students of this kind"
    for part in dict.fromkeys([*method.split("+"), method]):
        found |= _settings_of_method(table, pair, part)
    return found


def _settings_of_method(table, pair, method):
    """Returns {key: (value, source)} for the losses of a method for a pair; empty if the method is not in the table."""
    entry = table["methods"].get(method, {"settings": {}, "source": ""})
    found = {key: (value, entry["source"]) for key, value in entry["settings"].items()}
    of_pairs = entry.get("pairs", {})
    for key in {key for settings in of_pairs.values() for key in settings}:
        found[key] = found[key][0], f"{entry['source']}, for pairs without a value of their own"
    own = of_pairs.get("/".join(pair), {})
    return found | {key: (value, f"{entry['pairs_source']}, for this pair") for key, value in own.items()}


def _changes(table, pair, method):
    """Returns the settings of each method of a sum in the form that `methods.losses` expects."""
    changes = {}
    for part in method.split("+"):
        for key, (value, _) in _settings_of_method(table, pair, part).items():
            _, name, setting = key.split(".")
            changes.setdefault(part, {}).setdefault(name, {})[setting] = value
    return changes


def _name_in_table(table, network):
    """Returns the name of a network (name, width) in the table."""
    name, width = network
    if width == 1 and name in table["networks"]:
        return name
    for word in table["networks"]:
        if _network(table, word) == (name, width):
            return word
    raise networks.UnknownWordError("network", name if width == 1 else f"{name}_{width:g}", table["networks"])


def _network(table, name):
    """Returns (name, width) of the network that the table calls `name`."""
    entry = table["networks"][name]
    return entry.get("name", name), entry.get("width", 1.0)


def _set(config, key, value):
    *sections, name = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = ConfigDict()
        config = config[section]
    config[name] = value


def _value(config, key):
    for part in key.split("."):
        config = config[part]
    return list(config) if isinstance(config, tuple) else config
