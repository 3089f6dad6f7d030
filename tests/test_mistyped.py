"""What people mistype, what the commands say to it, and that what they advise is right."""

import shlex

import pytest

from cskd_jax.__main__ import main
from cskd_jax.runs import grid, run, schema, sweep

# What is typed; the message, with ... for what is left out; and, where there is one, what it advises in its place.
MISTYPED = """
trian digits:kd
    unknown command trian; did you mean cskd-jax train?
    -> train digits:kd
distill digits:kd
    unknown command distill; did you mean cskd-jax train?
    -> train digits:kd
main --config=digits:kd
    unknown command main; did you mean cskd-jax train?
    -> train --config=digits:kd
rport runs
    unknown command rport; did you mean cskd-jax report?
eval runs
    unknown command eval; did you mean cskd-jax evaluate?
import_torch t.pth
    unknown command import_torch; did you mean cskd-jax import-torch?
help
    unknown command help; did you mean cskd-jax --help?
    -> --help
show digits:kd
    unknown command show; did you mean cskd-jax config show?
    -> config show digits:kd
digits:kd
    unknown command digits:kd; did you mean cskd-jax train digits:kd?
    -> train digits:kd
foo
    unknown command foo; the commands are train, sweep, report, evaluate, export, import-torch, supervise, ...
--config=digits:kd
    put the command first, such as cskd-jax train --config=digits:kd
    -> train --config=digits:kd
--config.epochs=1 train digits:kd
    put the command first, such as cskd-jax train --config.epochs=1 digits:kd
    -> train --config.epochs=1 digits:kd
--verbose
    --verbose is given in place of a command; the commands are train, sweep, ...
    -> --version
--
    -- is given in place of a command; the commands are train, sweep, ...
train
    --config=RECIPE must name a file such as configs/digits.py, or one ..., tiny_imagenet_standard; got none
    -> train digits
train digit:kd
    there is no recipe digit; did you mean digits or digit_pairs?
    -> train digits
train cifar-100:kd
    there is no recipe cifar-100; did you mean cifar100?
    -> train cifar100
train digits:kdd
    unknown method 'kdd'; did you mean kd?
    -> train digits:kd
train digits:kd+kdd
    unknown method 'kdd'; did you mean kd?
train digits:momentum
    unknown method 'momentum'; known: cskd, cskd_paper, intra, inter, ce, kd, lskd, fitnet, ...
train digits:
    digits: lacks the name of a method, one of cskd, ...
train digits:kd+
    digits:kd+ lacks the name of a method, one of cskd, ...
train digits:kd/R18/R34
    digits:kd/R18/R34: the method comes last, as in R18/R34/kd
    -> train digits:R18/R34/kd
train kd:digits
    there is no recipe kd; did you mean digits:kd?
    -> train digits:kd
train digits=kd
    digits=kd is not a flag; did you mean digits:kd?
    -> train digits:kd
train digits:mlcskd
    mlcskd is a method for images with any number of classes, as in digit_pairs:mlcskd
    -> train digit_pairs:mlcskd
train digits:kd,at
    unknown method 'kd,at'; known: cskd, cskd_paper, ..., srrl; + joins several, as in kd+at
    -> train digits:kd+at
train digits --config.lr=0.1
    unknown configuration key lr; did you mean first_phase.learning_rate or optimizer.learning_rate or ...?
    -> train digits --config.optimizer.learning_rate=0.1
train digits:kd+kd
    kd+kd: a method is named twice
train digits:cskd+intra
    cskd+intra: the loss mse_logits is used by intra and by another method
train digits:fsp+ab
    ab+fsp: ab and fsp each need their own first phase
train digit_pairs:kd
    unknown method 'kd'; did you mean bkd?
    -> train digit_pairs:bkd
train digits:R18/kd
    'R18/kd' must be METHOD or TEACHER/STUDENT/METHOD
train digits:/R18/ce
    '/R18/ce' must be METHOD or TEACHER/STUDENT/METHOD
    -> train digits:R18/R18/ce
train digits:R18_0.25/R18_0.x/kd
    'R18_0.x' must be NETWORK or NETWORK_WIDTH, such as R18 or R18_0.25
    -> train digits:R18_0.25/R18/kd
train digits:R18/_0.5/kd
    '_0.5' must be NETWORK or NETWORK_WIDTH, such as R18 or R18_0.25
train cifar100_standard:resnet56/resnet21/kd
    unknown network 'resnet21'; did you mean resnet14 or resnet20 or resnet32?
    -> train cifar100_standard:resnet56/resnet20/kd
train cifar100_standard:resnet56/mobilenetv2/kd
    unknown network 'mobilenetv2'; did you mean mobilenet_v2?
    -> train cifar100_standard:resnet56/mobilenet_v2/kd
train cifar100_standard:resnet56/resnet20/crdd
    unknown method 'crdd'; did you mean crd?
    -> train cifar100_standard:resnet56/resnet20/crd
train digits:kd at
    expected one recipe, got digits:kd and at; a method follows a colon, ..., with commas between values
train --config digits:kd --config digits:at
    --config is given twice: digits:kd and digits:at
train --config
    --config needs a value, such as --config=digits:kd
    -> train --config=digits:kd
train config=digits:kd
    config=digits:kd is missing its dashes; did you mean --config=digits:kd?
    -> train --config=digits:kd
train digits:kd --epochs=1
    unknown flag --epochs; did you mean --config.epochs=1?
    -> train digits:kd --config.epochs=1
train digits:kd --epochs 1
    unknown flag --epochs; did you mean --config.epochs=1?
    -> train digits:kd --config.epochs=1
train digits:kd epochs=1
    epochs=1 is missing its dashes; did you mean --config.epochs=1?
    -> train digits:kd --config.epochs=1
train digits:kd config.epochs=1
    config.epochs=1 is missing its dashes; did you mean --config.epochs=1?
    -> train digits:kd --config.epochs=1
train digits:kd --learning-rate=0.2
    unknown flag --learning-rate; did you mean --config.teacher.learning_rate=0.2 or ...
    -> train digits:kd --config.optimizer.learning_rate=0.2
train digits:kd --width=0.5
    unknown flag --width; did you mean --config.teacher.width=0.5 or --config.student.width=0.5?
    -> train digits:kd --config.student.width=0.5
train digits:kd —config.epochs=1
    —config.epochs=1 begins with — instead of --; write --config.epochs=1
    -> train digits:kd --config.epochs=1
train —help
    —help begins with — instead of --; write --help
    -> train --help
train digits:kd \u2011\u2011workdir x
    \u2011\u2011workdir begins with \u2011\u2011 instead of --; write --workdir
    -> train digits:kd --workdir x
report runs \u2212-out=x
    \u2212-out=x begins with \u2212- instead of --; write --out=x
train digits:kd --batch-size 32
    unknown flag --batch-size; did you mean --config.batch_size=32?
    -> train digits:kd --config.batch_size=32
train digits --method=kd
    unknown flag --method; a method follows the recipe, as in digits:kd
    -> train digits:kd
train digits --methods=ce,kd
    unknown flag --methods; only cskd-jax sweep takes it; here one method follows the recipe, as in digits:kd
    -> sweep digits --methods=ce,kd
train digits config.method=kd
    config.method=kd is missing its dashes; a method follows the recipe, as in digits:kd
config show digits --method=kd
    unknown flag --method; a method follows the recipe, as in digits:kd
    -> config show digits:kd
train digits:kd --seeds=0-2
    unknown flag --seeds; only cskd-jax sweep takes it; here --config.seed sets the only seed
    -> train digits:kd --config.seed=0
train digits --teacher=resnet18
    unknown flag --teacher; did you mean --config.teacher.name=resnet18?
    -> train digits --config.teacher.name=resnet18
train digits --student resnet18
    unknown flag --student; did you mean --config.student.name=resnet18?
    -> train digits --config.student.name=resnet18
train digits --optimizer=adamw
    unknown flag --optimizer; did you mean --config.optimizer.name=adamw?
    -> train digits --config.optimizer.name=adamw
train digits --config.teacher=resnet18
    unknown configuration key teacher; did you mean teacher.name?
    -> train digits --config.teacher.name=resnet18
train digits:kd --checkpoint=x
    unknown flag --checkpoint; did you mean --config.teacher.checkpoint=x or --config.student.checkpoint=x?
    -> train digits:kd --config.teacher.checkpoint=x
train digits:kd --teacher_checkpoint=x
    unknown flag --teacher_checkpoint; did you mean --config.teacher.checkpoint=x?
    -> train digits:kd --config.teacher.checkpoint=x
train digits:kd --config.checkpoint=x
    unknown configuration key checkpoint; did you mean student.checkpoint or teacher.checkpoint?
train digits:kd --config.model.name=resnet18
    unknown configuration key model.name; did you mean student.name or teacher.name?
    -> train digits:kd --config.student.name=resnet18
train digits:kd --config_epochs=1
    unknown flag --config_epochs; did you mean --config.epochs=1?
    -> train digits:kd --config.epochs=1
train digits:kd --config-epochs 1
    unknown flag --config-epochs; did you mean --config.epochs=1?
train digits:kd --CONFIG.epochs=1
    unknown flag --CONFIG.epochs; did you mean --config.epochs=1?
train digits:kd --config:epochs=1
    unknown flag --config:epochs; did you mean --config.epochs=1?
train digits:kd --losses.kd.temperature=2
    unknown flag --losses.kd.temperature; did you mean --config.losses.kd.temperature=2?
    -> train digits:kd --config.losses.kd.temperature=2
train digits:kd --kd.temperature=2
    unknown flag --kd.temperature; did you mean --config.losses.kd.temperature=2?
train digits:kd --kd.temprature=2
    unknown flag --kd.temprature; did you mean --config.losses.kd.temperature=2?
train digits:kd --name=resnet18
    unknown flag --name; did you mean --config.teacher.name=resnet18 or --config.student.name=resnet18?
    -> train digits:kd --config.student.name=resnet18
train digits:kd --teacher-name=resnet18
    unknown flag --teacher-name; did you mean --config.teacher.name=resnet18?
    -> train digits:kd --config.teacher.name=resnet18
train digits:kd -o x
    unknown flag -o; the flags are --workdir, --coordinator, --processes, --process, --cluster, --config; ...
train digits:kd --temperature=2
    unknown flag --temperature; did you mean --config.losses.NAME.temperature=2?
train digits:kd --workdr=x
    unknown flag --workdr; did you mean --workdir?
train digits:kd --adamw
    unknown flag --adamw; the flags are --workdir, --coordinator, --processes, --process, --cluster, --config; ...
    -> config keys
train digits:kd --workdir
    --workdir needs a value; --help shows what is allowed
    -> train --help
train digits:kd --cluster=yes
    --cluster takes no value, got 'yes'; --help shows what is allowed
train digits:kd --processes=two
    --processes: 'two' is not an integer from 1 to 1000000; --help shows what is allowed
train digits:kd --workdir=
    the name of a folder is empty; the current folder is named .
    -> train digits:kd --workdir=.
train digits:kd --workdir=~nobody_here/x
    ~nobody_here/x: there is no user nobody_here; give the full path of the folder
train digits:kd --workdir=a --workdir=b
    --workdir is given twice: leave out one of them
    -> train digits:kd --workdir=b
train digits:kd --workdir=gs://b/run
    gs://b/run is a URL, not a folder: name a local or mounted folder, and copy it from or to gs:// with ...
train digits:kd --config.epoch=1
    unknown configuration key epoch; did you mean epochs?
    -> train digits:kd --config.epochs=1
train digits:kd --config.learning_rate=0.2
    unknown configuration key learning_rate; did you mean first_phase.learning_rate or optimizer.learning_rate or ...
    -> train digits:kd --config.optimizer.learning_rate=0.2
train digits:kd --config.kd.temprature=2
    unknown configuration key kd.temprature; did you mean losses.kd.temperature?
    -> train digits:kd --config.losses.kd.temperature=2
train digits:kd --config.losses.kd.temprature=2
    unknown configuration key losses.kd.temprature; did you mean losses.kd.temperature?
    -> train digits:kd --config.losses.kd.temperature=2
train digits:kd --config.optimizer.adamw=1
    unknown configuration key optimizer.adamw; optimizer has ...
train digits:kd --config.optimizer=adamw
    unknown configuration key optimizer; did you mean optimizer.name?
    -> train digits:kd --config.optimizer.name=adamw
train digits:kd --config.adamw=1
    unknown configuration key adamw; cskd-jax config keys lists all keys
train digits:kd --config.losses.at.weight=1
    losses.at.weight: this method has no at, only cross_entropy, kd; see configs/methods.py
train digits:kd --config.losses.kd=2
    unknown configuration key losses.kd; losses.kd has decay_epoch, end_epoch, standardize, ...
train digits:kd --config.method=at
    the method is set after the recipe, as in --config=RECIPE:METHOD, not by --config.method
train digits:kd --config.epochs=many
    epochs is 'many'; it must be an integer from 1 to 1000000
train digits:kd --config.epochs=1.5
    epochs is '1.5'; it must be an integer from 1 to 1000000
train digits:kd --config.epochs
    --config.epochs needs a value: epochs must be an integer from 1 to 1000000
train digits:kd --config.augment.flip=maybe
    augment.flip is 'maybe'; it must be true or false
train digits:kd --config.student.width=wide
    student.width is 'wide'; it must be a number greater than 0, up to 64
train digits:kd --config.student.name=
    student.name is ''; it must be one of deit_base, deit_small, deit_tiny, inception_v3, ...
train digits:kd --config.student.name=resnet-18
    student.name is 'resnet-18'; did you mean resnet18?
    -> train digits:kd --config.student.name=resnet18
train digits:wrn402/wrn162/kd
    teacher.name is 'wrn402'; did you mean wrn_40_2?
    -> train digits:wrn_40_2/wrn_16_2/kd
train digits:kd --config.optimizer.schedule=linear
    optimizer.schedule is 'linear'; it must be one of constant, cosine, step
train digits:kd --config.optimizer.milestones=ten
    optimizer.milestones is 'ten'; it must be increasing epochs up to 1000000 in parentheses, such as (100,150)
    -> train digits:kd --config.optimizer.milestones=(100,150)
train digits:kd --config.dataset.mean=x
    dataset.mean is 'x'; it must be finite numbers in parentheses, such as (0.5,) or (0.49,0.48,0.45)
train digits:kd --config.losses.kd.temperature=0
    losses.kd.temperature is 0.0; it must be a number greater than 0
train digits:crd --config.losses.crd.momentum=1
    losses.crd.momentum is 1.0; it must be a number in [0, 1)
train digits:cckd --config.losses.cckd.order=0
    losses.cckd.order is 0; it must be a positive integer
train digits:cskd --config.losses.category_structure.variant=papr
    losses.category_structure.variant is 'papr'; did you mean paper?
    -> train digits:cskd_paper --config.losses.category_structure.variant=paper
sweep digits
    --methods must name at least one method, such as --methods=ce,kd,cskd
    -> sweep digits --methods=ce,kd,cskd
sweep digits --methods ce kd
    expected one recipe, got digits and kd; a method follows a colon, ..., with commas between values
sweep digits:kd --methods=ce
    --config=digits:kd names a method; a sweep takes its methods from --methods
sweep digits --methods=ce,dk
    unknown method 'dk'; did you mean dkd?
    -> sweep digits --methods=ce,dkd
sweep digits --config.method=at
    a sweep takes its methods from --methods, such as --methods=ce,kd, not from --config.method
    -> sweep digits --methods=ce,kd
sweep digits --methods=kd --teacher=resnet18
    unknown flag --teacher; name it with --config.teacher.name=NETWORK, or several with --pairs=TEACHER/STUDENT,...
    -> sweep digits --methods=kd --config.teacher.name=resnet18
sweep digits --methods=kd+at,at+kd
    --methods lists at+kd twice
sweep digits --methods=ce,ce
    --methods lists ce twice
sweep digits --methods=ce --seeds=0..2
    --seeds is 0..2; it must list integers from 0 to 4294967295, such as 0,1,2 or 0-2
    -> sweep digits --methods=ce --seeds=0-2
sweep digits --methods=ce --seeds=2-0
    --seeds is 2-0; it must list integers from 0 to 4294967295, such as 0,1,2 or 0-2
sweep digits --methods=ce --seeds=0-2,1
    --seeds lists 1 twice
sweep digits --methods=ce --seeds=0-10000
    --seeds is 0-10000; a range holds at most 10000 seeds, such as 0-9999
sweep digits --methods=ce --pairs=R18
    --pairs is R18; it must list TEACHER/STUDENT, such as resnet56/resnet20
    -> sweep digits --methods=ce --pairs=resnet56/resnet20
sweep digits --methods=ce --pairs=
    --pairs is empty; it must list TEACHER/STUDENT, such as resnet56/resnet20
sweep digits --methods=ce --pairs=/R18
    --pairs is /R18; it must list TEACHER/STUDENT, such as resnet56/resnet20
sweep digits --methods=ce --pairs=R18/R18,r18/r18
    --pairs lists r18/r18 twice
sweep digits --methods=kd --pairs=resnet57/resnet20
    teacher.name is 'resnet57'; did you mean resnet50 or resnet56 or resnet152?
    -> sweep digits --methods=kd --pairs=resnet56/resnet20
sweep digits --methods=kd --config.teacher.epochs=0
    teacher.epochs is 0; it must be an integer from 1 to 1000000
sweep digits --methods=ce --seed=0
    unknown flag --seed; did you mean --seeds?
sweep digits --methods=kd --teacher_seeds=0-1 --config.teacher.checkpoint=x
    --teacher_seeds trains teachers, but teacher.checkpoint is x; give only one
    -> sweep digits --methods=kd --teacher_seeds=0-1
sweep digits --methods=ce --jobs=0
    --jobs: '0' is not an integer from 1 to 1000; --help shows what is allowed
    -> sweep --help
sweep digits --methods=ce --workdir s3://b/x
    s3://b/x is a URL, not a folder: name a local or mounted folder, and copy it from or to s3:// with ...
report
    name the folders of the runs, such as runs/sweep/digits
report nothing
    nothing holds no finished run: there is no results.json in it or below
report ''
    the name of a folder is empty; the current folder is named .
report runs --out=
    the name of a folder is empty; the current folder is named .
report gs://b/runs
    gs://b/runs is a URL, not a folder: name a local or mounted folder, and copy it from or to gs:// with ...
report runs --published
    --published prints published results alone: leave out the folders, or --published
    -> report --published
report runs --config=digits
    unknown flag --config; the flags are --workdir, --out, --data_dir, --published
report runs --output=x
    unknown flag --output; did you mean --out?
evaluate
    name one folder, such as cskd-jax evaluate runs/digits/kd-seed0; got none
evaluate a --workdir=b
    name one folder, such as cskd-jax evaluate runs/digits/kd-seed0; got a and b
evaluate nothing
    nothing is not a folder
evaluate --checkpoint=gs://b/run
    gs://b/run is a URL, not a folder: name a local or mounted folder, and copy it from or to gs:// with ...
evaluate workdir=runs
    workdir=runs is missing its dashes; did you mean --workdir=runs?
export runs/x
    --out is missing; name a new or empty folder, such as --out=exported
export runs/x --output=exported
    unknown flag --output; did you mean --out?
import-torch t.safetensors --key=model --out=y
    --key chooses a network of a PyTorch file; a .safetensors file holds one: leave out --key
import-torch t.pth --data_dir=x --out=y
    --data_dir and --path belong to --verify, which is not given
import-torch t.pth --mean=127 --std=0.5 --out=y
    --mean: '127' is not a number from 0 to 1; --help shows what is allowed
    -> import-torch --help
import-torch t.pth --output=exported
    unknown flag --output; did you mean --out?
import-torch t.pth
    --out is missing; name a new or empty folder, such as --out=exported
export --out=y
    name one folder, such as cskd-jax export runs/digits/kd-seed0 --out=exported; got none
export runs/x --out=gs://b/x
    gs://b/x is a URL, not a folder: name a local or mounted folder, and copy it from or to gs:// with ...
export gs://b/x --out=y
    gs://b/x is a URL, not a folder: name a local or mounted folder, and copy it from or to gs:// with ...
export runs/x --out=y --config=digits
    unknown flag --config; the flags are --workdir, --network, --best, --out, --size, --mean, --std
export runs/x --out=y --network=techer
    --network: invalid choice: 'techer' (choose from 'student', 'teacher'); --help shows what is allowed
import-torch --model=vgg8 --num_classes=10 --out=y
    name one file, such as teacher.pth; got none
import-torch t.pth --model=vgg8 --num_classes=ten --out=y
    --num_classes: 'ten' is not an integer from 0 to 1000000; --help shows what is allowed
import-torch t.pth --model=vgg8 --num_classes=10 --out=s3://b
    s3://b is a URL, not a folder: name a local or mounted folder, and copy it from or to s3:// with ...
supervise
    -- COMMAND is missing; --help shows what is allowed
    -> supervise --help
supervise --restart=3 -- true
    unknown flag --restart; did you mean --restarts?
supervise — cskd-jax train digits
    — begins with — instead of --; write --
supervise -- train digits:kd
    train is not a program; did you mean cskd-jax supervise -- cskd-jax train digits:kd?
supervise -- /no/such/program
    No such file or directory: /no/such/program
config
    config must be followed by show or keys, such as cskd-jax config show digits:kd
    -> config show digits:kd
config digits:kd
    config must be followed by show or keys, such as cskd-jax config show digits:kd
    -> config show digits:kd
config list
    config must be followed by show or keys, such as cskd-jax config show digits:kd
config get epochs
    config must be followed by show or keys, such as cskd-jax config keys epochs
    -> config keys epochs
config get digits:kd
    config must be followed by show or keys, such as cskd-jax config show digits:kd
config keys epochs=1
    config keys takes one pattern and no recipe, such as cskd-jax config keys epochs
    -> config keys epochs
config keys --epochs
    config keys takes one pattern and no recipe, such as cskd-jax config keys epochs
config keys digits --config.batch_size=1
    config keys takes one pattern and no recipe, such as cskd-jax config keys batch_size
    -> config keys batch_size
config shwo digits:kd
    config must be followed by show or keys, such as cskd-jax config show digits:kd
    -> config show digits:kd
config show digits:kd --epochs=1
    unknown flag --epochs; did you mean --config.epochs=1?
    -> config show digits:kd --config.epochs=1
config keys adamw
    no key matches adamw; all keys begin with ...
    -> config keys batch_size
config keys temprature
    no key matches temprature; did you mean losses.abkd.temperature or losses.binary_kd.temperature or ...
    -> config keys losses.crd.temperature
config keys a b
    config keys takes one pattern and no recipe, such as cskd-jax config keys optimizer
    -> config keys optimizer
"""


def cases():
    """Returns [(what is typed, message, advice or None)]."""
    found = []
    for line in MISTYPED.strip().splitlines():
        text = line.strip()
        if line == text:
            found.append([text, None, None])
        elif text.startswith("-> "):
            found[-1][2] = text.removeprefix("-> ")
        else:
            found[-1][1] = text
    return found


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command up to where a training or a sweep would start; returns its exit code and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "train", lambda config, workdir, adapt_devices: schema.validate(config))
    monkeypatch.setattr(sweep, "sweep", lambda runs, jobs: None)
    monkeypatch.setattr(grid, "load_data", lambda config: None)

    def call(line):
        code = main(["cskd-jax", *shlex.split(line)])
        return code, capsys.readouterr()

    return call


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX is loaded by other tests of this process.
@pytest.mark.parametrize(("typed", "message", "advised"), cases(), ids=[typed for typed, _, _ in cases()])
def test_mistyped(typed, message, advised, command, tmp_path):
    code, said = command(typed)
    assert code == 2
    (line,) = said.err.splitlines()
    beginning, dots, end = f"error: {message}".partition(" ...")
    assert line.startswith(beginning)
    assert line.endswith(end) if dots else line == beginning
    assert list(tmp_path.iterdir()) == [], "something was written"
    if advised is not None:
        code, said = command(advised)
        assert code == 0, said.err


def test_there_are_enough():
    assert len({typed for typed, _, _ in cases()}) == len(cases()) >= 40
