"""The training loop, in which one student or several see the same batches and share one pass of the teacher."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from cskd_jax.data.batches import read_steps
from cskd_jax.distributed import processes
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import InterruptedRun, kept_error
from cskd_jax.training.participant import Participant
from cskd_jax.training.programs import Reads, TeacherPass

# Share of the free memory that students trained together may take, according to the compiler.
_MEMORY_SHARE = 0.8
# Loading programs from the cache takes less than this; compiling them takes longer.
_LOADING_SECONDS = 3.0


class Loop:
    """The training of one or several students on the same batches.

    A training step is one pass of the teacher followed by one step of every student. The students that are furthest
    behind go first: one that was restored at an earlier step than the others catches up, and then all continue
    together. Training together does not change a single bit of a student, because every student has its own programs
    and the pass is the same for all.

    Args:
      participants: The students, whose setups agree in everything that determines the batches.
      teacher_pass: The programs that prepare the batches.
    """

    def __init__(self, participants: Sequence[Participant], teacher_pass: TeacherPass):
        self._participants, self._pass = participants, teacher_pass
        self._setup = participants[0].setup
        self._reads = Reads.union([participant.programs.reads for participant in participants])
        self._batches: Iterator[tuple[int, dict[str, jax.Array]]] = iter(())
        self._next_step, self._is_ahead = -1, False

    def run(
        self,
        stop: StopRequest,
        teacher_variables: Any = None,
        on_done: Callable[[Participant], None] = lambda participant: None,
    ) -> None:
        """Trains all students to the end from their newest checkpoints; their attributes hold the results.

        Args:
          stop: Request to stop, which is checked before every step.
          teacher_variables: Variables of the teacher, replicated over the devices.
          on_done: Function that is called with a student once it is done or has failed.

        Raises:
          InterruptedRun: `stop` was requested; the states are saved.
        """
        # The compiler mostly runs on one core.
        pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        with contextlib.ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            for participant in self._participants:
                with kept_error(participant):
                    stack.enter_context(participant)
            waiting = self._close_done(self._participants, on_done)
            teacher_variables = None if self._reads.teacher is None else teacher_variables
            if teacher_variables is not None:
                for participant in waiting:
                    participant.programs.take_teacher(teacher_variables)
            while waiting:
                active = self._begin(waiting, pool)
                waiting = [participant for participant in waiting if participant not in active]
                while active:
                    stopped = self._train_part(active, stop, teacher_variables, pool)
                    active = self._close_done(active, on_done)
                    if stopped and (active or waiting):
                        raise InterruptedRun(_describe_stop(stop, [*active, *waiting]))

    def _close_done(self, participants, on_done):
        """Closes the students that are done and returns the others."""
        for participant in participants:
            if participant.done:
                participant.close()
                on_done(participant)
        return [participant for participant in participants if not participant.done]

    def _begin(self, participants, pool):
        """Compiles the first steps of all students, begins with as many as memory allows, and returns those."""
        size = self._setup.sampler.batch_size
        with _pause(participants, "compiling the training step"):
            self._pass.compile(size, self._reads, pool)
            for participant in participants:
                participant.compile(size, pool)
            self._use_free_cores(participants, size, pool)
            if len(participants) > 1:
                self._wait_for_compiler(participants, size)
                # All processes must train the same students together, whatever memory each has left.
                participants = participants[: processes.on_first(self._count_fitting, participants, size)]
            for participant in participants:
                participant.begin(len(participants))
            self._wait_for_compiler(participants, size)
        self._is_ahead = False
        return participants

    def _count_fitting(self, participants, size):
        """Returns how many of the first students, at least one, have states and a largest step that fit into memory."""
        limit, used, largest = self._setup.devices.free_memory(), self._pass.memory(size), 0
        for number, participant in enumerate(participants):
            kept, temporary = participant.memory(size)
            used, largest = used + kept, max(largest, temporary)
            if number and used + largest > _MEMORY_SHARE * limit:
                return number
        return len(participants)

    def _use_free_cores(self, participants, size, pool):
        """Compiles ahead while the compiler works on the first steps, unless it is about to be done with them."""
        soon = time.monotonic() + _LOADING_SECONDS
        while time.monotonic() < soon and not self._is_compiled(participants, size):
            time.sleep(0.01)
        for participant in participants:
            if not self._is_compiled(participants, size):
                self._compile_ahead([participant], pool)

    def _compile_ahead(self, participants, pool):
        """Compiles what the rest of the first epoch needs, in the background, unless already requested."""
        self._pass.compile(self._setup.sampler.last_batch_size, self._reads, pool)
        for participant in participants:
            participant.compile_ahead(pool)

    def _train_part(self, active, stop, teacher_variables, pool):
        """Trains the students furthest behind to the end of the epoch, or up to the next student; then calls `rest`.

        Returns whether a stop was requested.
        """
        step = min(participant.step for participant in active)
        together = [participant for participant in active if participant.step == step]
        steps_per_epoch = self._setup.sampler.steps_per_epoch
        ahead = [participant.step for participant in active if participant.step > step]
        end = min([(step // steps_per_epoch + 1) * steps_per_epoch, *ahead])
        for participant in together:
            participant.start_clock()
        while step < end and together and not stop.reached():
            size, batch = self._batch(step, max(participant.steps for participant in active))
            self._compile_late(together, size, pool)
            prepared = self._pass(size, step, teacher_variables, batch.pop("image"))
            if self._setup.devices.steps_in_flight == 1:
                # In this case, only one program may run at a time.
                jax.block_until_ready(prepared)
            for participant in together:
                if participant.error is None:
                    with kept_error(participant):
                        participant.train_step(size, {**prepared, **batch})
            if not self._is_ahead:
                self._compile_ahead(active, pool)
                self._is_ahead = True
            together = [participant for participant in together if participant.error is None]
            step += 1
        stopped = stop.requested
        for participant in together:
            with kept_error(participant):
                participant.drain()
        # A student that is waiting for the others may not have saved its last epoch.
        for participant in active if stopped else together:
            if participant.error is None and (step % steps_per_epoch == 0 or stopped):
                with kept_error(participant):
                    participant.rest(stopping=stopped)
        return stopped

    def _batch(self, step, total):
        """Returns the global batch size of a step and this process's rows of the batch, on the devices."""
        if step != self._next_step:
            self._batches = self._read(step, total)
        self._next_step = step + 1
        return next(self._batches)

    def _read(self, step, total):
        setup = self._setup
        devices, micro_batch_size = setup.devices, setup.micro_batch_size

        def rows(size):
            return devices.interleave(size, micro_batch_size)[devices.local_rows(size)]

        for size, batch in read_steps(setup.data.train, setup.sampler, range(step, total), rows):
            yield size, devices.shard(batch)

    def _compile_late(self, participants, size, pool):
        """Compiles whatever the next step still needs, or waits for it."""
        if self._is_compiled(participants, size):
            return
        # Waiting blocks the host; it should not count toward the time of the steps in flight, or of the next step. Some
        # of several processes may skip this, but all of them must read the metrics of a step at the same point.
        for participant in () if processes.is_distributed() else participants:
            with kept_error(participant):
                participant.drain()
        with _pause(participants, f"compiling the training step for batches of {size}"):
            self._pass.compile(size, self._reads, pool)
            for participant in participants:
                participant.compile(size, pool)
            self._wait_for_compiler(participants, size)
        for participant in participants:
            participant.start_clock()

    def _is_compiled(self, participants, size):
        return self._pass.is_compiled(size) and all(participant.is_compiled(size) for participant in participants)

    def _wait_for_compiler(self, participants, size):
        self._pass.compiled(size)
        for participant in participants:
            participant.wait_for_compiler(size)


@contextlib.contextmanager
def _pause(participants: Sequence[Participant], what: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for participant in participants:
            stack.enter_context(participant.pause(what))
        yield


def _describe_stop(stop: StopRequest, participants: Sequence[Participant]) -> str:
    is_saved = participants[0].setup.workdir is not None
    steps = sorted({participant.step for participant in participants})
    who = participants[0].name if len(participants) == 1 else f"{len(participants)} students"
    where = f"step {' and '.join(map(str, steps))} of the {who}"
    if not is_saved:
        return f"stopped by {stop.name} at {where}"
    return f"stopped by {stop.name}, saved at {where}: the same command resumes"
