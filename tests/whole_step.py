"""A training step from images to the new state: the teacher pass and the step of one student."""

from cskd_jax.training.step import make_teacher_pass, make_train_step


def make_whole_step(
    student, objective, optimizer, *, teacher=None, preprocess=lambda images, *_: images, axis_name=None
):
    """Returns `(state, teacher_variables, batch, key) -> (state, metrics)`."""
    teacher_pass = make_teacher_pass(teacher, preprocess=preprocess, axis_name=axis_name)
    train_step = make_train_step(student, objective, optimizer, axis_name=axis_name)

    def whole_step(state, teacher_variables, batch, key):
        prepared = teacher_pass(teacher_variables, batch["image"], key, state.step)
        return train_step(state, batch | prepared, key)

    return whole_step
