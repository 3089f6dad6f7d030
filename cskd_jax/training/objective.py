"""The objective: a weighted sum of losses."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from cskd_jax.configs.methods import METHODS, MULTILABEL_METHODS
from cskd_jax.errors import UserError, meant
from cskd_jax.losses import LOSSES, LossInputs, Method, gather_batch, half_cosine
from cskd_jax.models import ModelOutput
from cskd_jax.training import rules
from cskd_jax.training.layers import Layers
from cskd_jax.training.outputs import Outputs, guard, with_teacher

# The metrics and the columns of the history that are not losses; "accuracy" is what earlier versions called "top1".
_RESERVED = frozenset(
    {"accuracy", "epoch", "gradient_norm", "learning_rate", "loss", "mean_average_precision", "phase", "split", "step"}
    | {"top1"}
)
_SET_BY_OBJECTIVE = {"num_classes", "axis_name", "num_examples", "batch_size", "teacher", "parent", "name"}
# The teacher of a loss that learns from the moving average of the student.
AVERAGE = "average"


def hyperparameters(loss: type[Method]) -> dict[str, dataclasses.Field]:
    """Returns the hyperparameters of a loss by name, not including the fields of `Weight`."""
    return {field.name: field for field in dataclasses.fields(loss) if field.name not in _SET_BY_OBJECTIVE}


def needs_teacher(losses: Any) -> bool:
    """Returns whether any loss in {name in `LOSSES`: settings} reads a teacher other than the student's average."""
    # An entry that is not a section of settings is rejected when the configuration is validated.
    teachers = {name: getattr(settings, "get", {}.get)("teacher") for name, settings in losses.items()}
    return any(LOSSES[name].needs_teacher and teacher != AVERAGE for name, teacher in teachers.items())


@dataclasses.dataclass(frozen=True)
class Weight:
    """Weight of a loss over the epochs of a run; epochs are counted from 0.

    Attributes:
      weight: Weight of the loss outside of warm-up and decay.
      start_epoch: The first epoch with the loss.
      end_epoch: The first epoch without it; None if it stays to the end.
      warmup_epochs: Number of epochs over which the weight grows linearly: 1/n of it in the first, all in the n-th.
      decay_epoch: The number of epochs after which the weight falls along half a cosine, to 0 in the last epoch before
        `end_epoch`, which must then be given; None if it does not fall.
    """

    weight: float
    start_epoch: int = 0
    end_epoch: int | None = None
    warmup_epochs: int = 0
    decay_epoch: int | None = None

    @property
    def wrong(self) -> str | None:
        """Returns what is wrong with the epochs, beginning with the name of an attribute; None if they make sense."""
        if self.end_epoch is not None and self.end_epoch <= self.start_epoch:
            return f"end_epoch is {self.end_epoch}; it must be greater than start_epoch, {self.start_epoch}"
        if self.decay_epoch is None:
            return None
        if self.end_epoch is None:
            return f"decay_epoch is {self.decay_epoch}; it needs end_epoch, by which the weight reaches 0"
        if not self.start_epoch <= self.decay_epoch < self.end_epoch:
            allowed = f"at least start_epoch, {self.start_epoch}, and less than end_epoch, {self.end_epoch}"
            return f"decay_epoch is {self.decay_epoch}; it must be {allowed}"
        return None

    def is_on(self, epoch: jax.Array) -> jax.Array | bool:
        """Returns whether the loss counts in `epoch`, an integer scalar; a Python bool if all epochs are alike."""
        if not self.weight:
            return False
        if not self.start_epoch and self.end_epoch is None:
            return True
        before_end = True if self.end_epoch is None else epoch < self.end_epoch
        return (epoch >= self.start_epoch) & before_end

    def at(self, epoch: jax.Array) -> jax.Array | float:
        """Returns the weight in `epoch`, an integer scalar."""
        weight = self.weight
        if self.warmup_epochs:
            weight = weight * jnp.minimum((epoch - self.start_epoch + 1).astype(float) / self.warmup_epochs, 1)
        if self.decay_epoch is not None and self.end_epoch is not None:
            weight = weight * half_cosine(epoch + 1 - self.decay_epoch, self.end_epoch - self.decay_epoch)
        on = self.is_on(epoch)
        return weight if isinstance(on, bool) else jnp.where(on, weight, 0)


# What the fields of `Weight` may be.
WEIGHT_RULES = {
    "weight": rules.NOT_NEGATIVE,
    "start_epoch": rules.integer(0),
    "end_epoch": rules.optional(rules.integer(1)),
    "warmup_epochs": rules.integer(0),
    "decay_epoch": rules.optional(rules.integer(0)),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """total = sum over the losses of weight * loss.

    Attributes:
      losses: {name: (weight, module)}, sorted by name, because the position of a loss determines its initial
        parameters.
      steps_per_epoch: Number of steps in an epoch, for weights that change.
    """

    losses: Mapping[str, tuple[Weight, Method]]
    steps_per_epoch: int = 1

    @classmethod
    def create(
        cls,
        losses: Mapping[str, Any],
        *,
        num_classes: int,
        axis_name: str | None = None,
        num_examples: int = 0,
        batch_size: int = 0,
        steps_per_epoch: int = 1,
    ) -> "Objective":
        """Returns the objective that a dictionary describes.

        Args:
          losses: {name: entry}. The entry of a loss of `LOSSES` is its weight, or a dictionary with "weight" (1 if left
            out), the other fields of `Weight`, "teacher" (see `Method`) and hyperparameters of the loss. A custom loss
            is given as "loss" in the dictionary, or as the entry itself: a function of `LossInputs` that returns a
            scalar, or a scalar and {term: scalar}; or a `Method`, class or instance.
          num_classes: Number of classes.
          axis_name: Mapped axis over which the batch is split; None on one device.
          num_examples: Size of the training split, for losses that keep a memory of its samples.
          batch_size: Number of images that the losses see at once, over all devices, for losses whose parameters depend
            on it.
          steps_per_epoch: Number of steps in an epoch, for weights that change.

        Raises:
          UserError: A loss or one of its settings is unknown, or a setting has a value that it cannot have.
        """
        if not hasattr(losses, "items"):
            raise UserError(f"losses is {losses!r}; it must be a dictionary of losses, such as {{'kd': 0.9}}")
        common = {"num_classes": num_classes, "axis_name": axis_name}
        common |= {"num_examples": num_examples, "batch_size": batch_size}
        fields = {field.name for field in dataclasses.fields(Weight)}
        created = {}
        for name, entry in sorted(losses.items()):
            if "/" in name:
                raise UserError(f"a loss cannot be named {name}: a slash separates a loss from its terms")
            if name in _RESERVED:
                raise UserError(f"a loss cannot be named {name}: metrics and rows of the history use that name")
            settings = as_settings(entry)
            loss, teacher = settings.pop("loss", None), settings.pop("teacher", None)
            weight = _create_weight(name, {key: value for key, value in settings.items() if key in fields})
            hyper = {key: value for key, value in settings.items() if key not in fields}
            own = common | {"teacher": _number_of_teacher(name, teacher)}
            created[name] = (weight, _create_loss(name, loss, hyper, own))
        return cls(created, steps_per_epoch)

    @property
    def teacher_reader(self) -> str | None:
        """Returns the name of a loss that requires a teacher; None if none does."""
        needed = (name for name, (_, loss) in self.losses.items() if loss.needs_teacher and loss.teacher != AVERAGE)
        return next(needed, None)

    @property
    def average_reader(self) -> str | None:
        """Returns the name of a loss that learns from the moving average of the student; None if none does."""
        return next((name for name, (_, loss) in self.losses.items() if loss.teacher == AVERAGE), None)

    @property
    def views(self) -> int:
        """Returns how many further views of the images the losses need."""
        return max((loss.views for _, loss in self.losses.values()), default=0)

    @property
    def peers(self) -> int:
        """Returns how many networks like the student learn together with it."""
        return max((loss.num_peers for _, loss in self.losses.values()), default=0)

    @property
    def may_read_teacher(self) -> bool:
        """Returns whether any of the losses reads the outputs of a teacher if there is one."""
        own = any(isinstance(loss, FunctionLoss) for _, loss in self.losses.values())
        return own or self.teacher_reader is not None

    def init(self, key: jax.Array, inputs: LossInputs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns (parameters, memory), each by loss name for losses that have any; reads only shapes of `inputs`."""
        inputs, params, memory = guard(inputs), {}, {}
        for position, (name, (_, loss)) in enumerate(self.losses.items()):
            # The parameters do not depend on how the batch is split, and no axis is mapped here.
            alone = loss.clone(axis_name=None)
            with _naming(name):
                seen = with_teacher(inputs, loss.teacher)
                variables = alone.lazy_init(jax.random.fold_in(key, position), seen)
            if "params" in variables:
                params[name] = variables["params"]
            if "memory" in variables:
                memory[name] = variables["memory"]
        return params, memory

    def find_reads(self, params: Any, memory: Any, inputs: LossInputs) -> tuple[ModelOutput, Layers]:
        """Returns which outputs and layers of the teacher the losses read, found by tracing; reads only shapes.

        An output that is read for one view of the images counts as read for all views.

        Args:
          params: {name: parameters of the loss}.
          memory: {name: memory of the loss}.
          inputs: A batch, with a teacher.

        Returns:
          A `ModelOutput` and `Layers` of booleans.
        """
        whole = {name: (weight, loss.clone(axis_name=None)) for name, (weight, loss) in self.losses.items()}
        objective = dataclasses.replace(self, losses=whole)
        step = jax.ShapeDtypeStruct((), jnp.int32)

        def evaluate(teacher, inputs, params, memory, step):
            output, layers = teacher
            views = tuple(view._replace(teacher=output) for view in inputs.views)
            inputs = inputs._replace(teacher=output, teacher_head=layers.head, teacher_norms=layers.norms, views=views)
            return objective(params, memory, inputs, step)

        teacher = inputs.teacher, Layers(inputs.teacher_head, inputs.teacher_norms)
        views = tuple(view._replace(teacher=None) for view in inputs.views)
        others = inputs._replace(teacher=None, teacher_head=None, teacher_norms=None, views=views)
        traced = jax.make_jaxpr(evaluate)(teacher, others, params, memory, step).jaxpr
        read = {x for x in traced.outvars if isinstance(x, jax.extend.core.Var)}
        for equation in reversed(traced.eqns):
            if equation.effects or read.intersection(equation.outvars):
                read.update(x for x in equation.invars if isinstance(x, jax.extend.core.Var))
        leaves, structure = jax.tree.flatten(teacher)
        return jax.tree.unflatten(structure, [x in read for x in traced.invars[: len(leaves)]])

    def __call__(
        self, params: Mapping[str, Any], memory: Mapping[str, Any], inputs: LossInputs, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Any]]:
        """Evaluates the losses on one batch.

        Args:
          params: {name: parameters of the loss}, from `init`.
          memory: {name: memory of the loss}, from `init` or the previous step.
          inputs: The batch.
          step: int32, the number of optimization steps done.

        Returns:
          The weighted total; {NAME: unweighted value, NAME/TERM: value of a term} for every loss; the new memory.
        """
        total: Any = 0.0
        inputs, terms, new_memory = guard(inputs), {}, {}
        epoch = step // self.steps_per_epoch
        for name, (weight, loss) in self.losses.items():
            variables = {"params": params.get(name, {}), "memory": memory.get(name, {})}
            with _naming(name):
                seen = with_teacher(inputs, loss.teacher)._replace(epoch=jnp.maximum(epoch - weight.start_epoch, 0))
                on = weight.is_on(epoch)
                if not isinstance(on, bool):
                    seen, variables["params"] = _differentiated_if(on, (seen, variables["params"]))
                found, updated = loss.apply(variables, seen, mutable=["memory"])
            value, parts = found if isinstance(found, tuple) else (found, {})
            _check_scalars(name, value, parts)
            total += self._weigh(weight, value, step)
            terms[name] = value
            terms |= {f"{name}/{term}": part for term, part in parts.items()}
            if name in memory:
                new_memory[name] = updated["memory"]
        return total, terms, new_memory

    @property
    def predictor(self) -> str | None:
        """Returns the name of the loss that replaces the prediction of the student, or None."""
        return next((name for name, (_, loss) in self.losses.items() if loss.predicts), None)

    def predict(self, params: Mapping[str, Any], memory: Mapping[str, Any], output: ModelOutput) -> jax.Array:
        """Returns the logits with which a student with these outputs predicts, given the memory after the batch."""
        name = self.predictor
        if name is None:
            return output.logits
        variables = {"params": params.get(name, {}), "memory": memory.get(name, {})}
        logits: Any = self.losses[name][1].apply(variables, output, method="predict")
        return logits

    def split(self, terms: Mapping[str, jax.Array], step: jax.Array) -> tuple[Any, Any]:
        """Returns the weighted totals of the losses that need no teacher, and of those that do.

        Args:
          terms: The unweighted values of the losses by name, as `__call__` returns them.
          step: int32, the number of optimization steps done.
        """
        totals = [jnp.zeros_like(next(iter(terms.values())))] * 2
        for name, (weight, loss) in self.losses.items():
            totals[loss.needs_teacher] += self._weigh(weight, terms[name], step)
        return totals[False], totals[True]

    def _weigh(self, weight, value, step):
        """Returns what a loss adds to the total: 0 if it is off, even if its value is not finite."""
        epoch = step // self.steps_per_epoch
        on, factor = weight.is_on(epoch), weight.at(epoch)
        if isinstance(factor, jax.Array):  # A factor of another type would determine the type of the total.
            factor = factor.astype(jnp.result_type(value, float))
        if isinstance(on, bool):
            return factor * (value if on else jnp.zeros_like(value))
        return jnp.where(on, factor * value, 0)


def _differentiated_if(on, tree):
    """Returns the tree, through whose arrays no gradient flows unless `on`.

    A weight of 0 does not suffice, since 0 times an infinite derivative is NaN.
    """

    def choose(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.where(on, x, lax.stop_gradient(x)) if floating else x

    return jax.tree.map(choose, tree)


class FunctionLoss(Method):
    """A plain function as a loss, which sees the whole batch even if the batch is split over devices.

    Attributes:
      function: The function of `LossInputs`, which returns a scalar, or a scalar and {term: scalar}.
    """

    function: Callable[[LossInputs], Any] | None = None
    needs_teacher = False

    def __call__(self, inputs: LossInputs) -> Any:
        """Returns what the function returns for the global batch."""

        def gather(x):
            return gather_batch(x, self.axis_name)

        student: Any = inputs.student
        teacher: Any = inputs.teacher
        average: Any = inputs.average
        inputs = inputs._replace(
            student=Outputs(student.output, "student", gather),
            teacher=None if teacher is None else Outputs(teacher.output, "teacher", gather),
            average=None if average is None else Outputs(average.output, "moving average", gather),
            views=jax.tree.map(gather, inputs.views),
            labels=gather(inputs.labels),
            indices=None if inputs.indices is None else gather(inputs.indices),
            mixed=jax.tree.map(gather, inputs.mixed),
        )
        assert self.function is not None
        return self.function(inputs)


def as_settings(entry: Any) -> dict[str, Any]:
    """Returns the entry of a loss in `Objective.create` as a dictionary with Python numbers."""
    if isinstance(entry, Mapping) or hasattr(entry, "to_dict"):
        return {key: _as_python(value) for key, value in entry.items()}
    entry = _as_python(entry)
    return {"weight": entry} if isinstance(entry, int | float) else {"loss": entry}


def _as_python(value):
    """Returns a Python number for a scalar of NumPy or JAX, and anything else as it is."""
    return value.item() if isinstance(value, np.generic | jax.Array) and value.ndim == 0 else value


def _create_weight(name, settings):
    """Returns the weight of a loss; raises UserError if its settings make no sense."""
    weight = Weight(**{"weight": 1.0} | settings)
    for field, rule in WEIGHT_RULES.items():
        rules.check(f"losses.{name}.{field}", getattr(weight, field), rule)
    if weight.wrong:
        raise UserError(f"losses.{name}.{weight.wrong}")
    return weight


def _number_of_teacher(name, teacher):
    """Returns the teacher of a loss, whose number may be given as a string; raises UserError if it is invalid."""
    number = int(teacher) if isinstance(teacher, str) and teacher.isdecimal() else teacher
    if number in (None, AVERAGE) or (type(number) is int and number >= 0):
        return number
    raise UserError(
        f"losses.{name}.teacher is {teacher!r}; it must be {AVERAGE!r}, None, or the number of a teacher (from 0)"
    )


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Returns a context in which an error names the loss that raised it."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"losses.{name}: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"losses.{name}: {error}") from error


def _check_scalars(name, value, parts):
    """Raises ValueError unless a loss has returned scalars."""
    if not isinstance(parts, Mapping):
        raise ValueError(f"losses.{name} must return a scalar, or a scalar and a dictionary of scalars")
    for key, part in [(name, value), *((f"{name}/{term}", part) for term, part in parts.items())]:
        if not isinstance(part, jax.Array | int | float | np.generic) or jnp.shape(part) != ():
            shape = f"shape {jnp.shape(part)}" if hasattr(part, "shape") else type(part).__name__
            raise ValueError(f"losses.{key} must be a scalar; got {shape}")


def _create_loss(name, loss, hyper, common):
    """Returns the module of a loss, from its name or as given."""
    if loss is None:
        if name not in LOSSES:
            if name in (*METHODS, *MULTILABEL_METHODS):
                multilabel = ", multilabel=True" if name in MULTILABEL_METHODS else ""
                words = f"cskd_jax.configs.methods.losses('{name}'{multilabel})"
                raise UserError(f"losses.{name} is unknown; {name} is a method, whose losses are {words}")
            known = f"give a function or a Method, or use one of {', '.join(sorted(LOSSES))}"
            raise UserError(f"losses.{name} is unknown; {meant(name, LOSSES) or known}")
        loss = LOSSES[name]
    if isinstance(loss, type) and issubclass(loss, Method):
        allowed = {*hyperparameters(loss)}
        unknown = sorted(hyper.keys() - allowed)
        if unknown:
            allowed |= {field.name for field in dataclasses.fields(Weight)}
            allowed |= {"teacher"} if loss.needs_teacher else set()
            known = f"it has {', '.join(sorted(allowed))}"
            raise UserError(f"losses.{name} has no setting {unknown[0]}; {meant(unknown[0], allowed) or known}")
        return _checked(name, loss(**common, **hyper))
    if hyper:
        raise UserError(f"losses.{name} takes only the settings of its weight; got {', '.join(sorted(hyper))}")
    if isinstance(loss, Method):
        own = {} if common["teacher"] is not None else {"teacher": _number_of_teacher(name, loss.teacher)}
        return _checked(name, loss.clone(**common | own))
    if callable(loss):
        return FunctionLoss(**common, function=loss)
    raise UserError(f"losses.{name} must be a number, a dictionary, a function or a Method; got {loss!r}")


def _checked(name, loss):
    """Returns a loss; raises UserError if one of its settings has a value that it cannot have."""
    for setting, field in hyperparameters(type(loss)).items():
        rule = rules.of_field(field)
        if rule is not None:
            rules.check(f"losses.{name}.{setting}", getattr(loss, setting), rule)
    return loss
