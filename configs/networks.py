"""Words for a pair of networks and a method, such as R152_0.5/R34_0.25/cckd: rows and columns of published tables."""


class UnknownWordError(ValueError):
    """An error for an unknown word, from which the command suggests the nearest known word.

    Args:
      kind: What the word should name, such as "method".
      word: The unknown word.
      known: Words that are allowed in its place.
      note: Text that follows them.
    """

    def __init__(self, kind, word, known, note=""):
        super().__init__(f"unknown {kind} {word!r}; known: {', '.join(known)}{note}")
        self.kind, self.word, self.known = kind, word, tuple(known)


def split_word(word, teacher, student, small_images=True):
    """Returns (teacher, student, method) for METHOD or TEACHER/STUDENT/METHOD, each network as (name, width).

    Args:
      word: Text after the colon; case does not matter, nor does the order of methods joined by +. A network is a name
        in MODELS, possibly with hyphens for underscores, or R18 to R152 for the ResNets, followed by `_WIDTH` unless
        the width is 1.
      teacher: Teacher of the recipe, used for a METHOD alone.
      student: Student of the recipe, used for a METHOD alone.
      small_images: Whether R18 means resnet18 rather than resnet18_224.

    Returns:
      A tuple of (name, width) of the teacher, (name, width) of the student, and the name of the method.

    Raises:
      ValueError: If the word has a different number of parts, an empty part, or a network without a name or width.
    """
    parts = word.split("/")
    method = in_order(parts[-1].lower())
    if len(parts) == 1:
        return teacher, student, method
    if len(parts) != 3 or "" in parts:
        raise ValueError(f"{word!r} must be METHOD or TEACHER/STUDENT/METHOD")
    return network(parts[0], small_images), network(parts[1], small_images), method


def in_order(word):
    """Returns a word with the methods of a sum in alphabetical order, such as at+kd for kd+at: both are one run."""
    before, slash, method = word.rpartition("/")
    return before + slash + "+".join(sorted(method.split("+")))


def run_name(word, method):
    """Returns a word as it is in the name of a run, with its method as the recipe spells it: case may not matter."""
    before, slash, own = in_order(word.lower()).rpartition("/")
    return word[: len(before)] + slash + method if own == method.lower() else in_order(word)


def network(word, small_images=True):
    """Returns (name, width) from the word for a network, such as ("resnet34", 0.25) for R34_0.25."""
    name, width = word.lower().replace("-", "_"), 1.0
    before, _, last = name.rpartition("_")
    if "." in last:
        try:
            name, width = before, float(last)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"{word!r} must be NETWORK or NETWORK_WIDTH, such as R18 or R18_0.25")
    depth = name.removeprefix("resnet").removeprefix("r")
    if depth in ("18", "34", "50", "101", "152"):
        name = f"resnet{depth}" if small_images else f"resnet{depth}_224"
    return name, width
