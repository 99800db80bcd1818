"""Flags, presets and configuration files become runs; wrong ones stop in one line."""

import dataclasses
import json
import re
import shlex
import string
from pathlib import Path

import pytest

from diff_dalle.config import (
    ClassifierRun,
    GeneratorRun,
    Parser,
    from_flat,
    make_record,
    parse_run,
    parse_sample_run,
    shaping_fields,
    to_flat,
)
from diff_dalle.conversion import ConvertConfig
from diff_dalle.data.demo import DemoDataConfig
from diff_dalle.data.inspection.run import InspectConfig
from diff_dalle.data.inspection.show_order import OrderConfig
from diff_dalle.data.packing.pack import PackConfig
from diff_dalle.errors import UsageError
from diff_dalle.evaluation.curves import CurvesConfig
from diff_dalle.evaluation.shapes_run import ShapesConfig
from diff_dalle.evaluation.upsampler_run import UpsamplerConfig
from diff_dalle.presets import PRESETS
from diff_dalle.sampling_io.config import SampleConfig
from diff_dalle.training.run_data import RunData
from diff_dalle.training.train_config import TrainConfig

README_GENERATOR = (
    "--data_dir path/to/images --image_size 64 --num_channels 128 --num_res_blocks 2 "
    "--enc_attn_dim 512 --dropout 0.1 --use_fp16 True --noise_schedule cosine "
    "--lr 3e-4 --batch_size 512 --microbatch 64"
)
README_CLASSIFIER = (
    "--data_dir path/to/train_data --val_data_dir path/to/val_data --image_size 64 "
    "--classifier_depth 2 --classifier_width 128 --classifier_enc_attn_dim 512 --use_fp16 True "
    "--iterations 300000 --batch_size 128 --lr 3e-4 --weight_decay 0.1"
)
README_SAMPLE = (
    "--model_path model_ema.pt --classifier_path classifier.pt --data_dir path/to/texts "
    "--image_size 64 --num_channels 128 --num_res_blocks 2 --use_fp16 True "
    "--classifier_depth 2 --classifier_width 128 --classifier_enc_attn_dim 512 "
    "--classifier_scale 1.0 --noise_schedule cosine --timestep_respacing 250"
)
# Every flag that the ancestors' users type, for each kind of run.
PUBLIC_GENERATOR = """image_size small_size num_channels num_res_blocks channel_mult
attention_resolutions num_head_channels enc_attn_dim text_length dropout use_fp16 noise_schedule
diffusion_steps learn_sigma lr weight_decay batch_size microbatch ema_rate iterations
lr_anneal_steps warmup_steps log_interval save_interval resume_checkpoint gaussian_blur data_dir
index_dir val_data_dir index_dir_val schedule_sampler use_kl predict_xstart rescale_timesteps
rescale_learned_sigmas sigma_small num_heads num_heads_upsample resblock_updown
use_scale_shift_norm use_new_attention_order use_checkpoint dropout_text anneal_lr eval_interval
fp16_scale_growth resume_checkpoints device seed num_workers precision cond_drop_prob
max_grad_norm adam_beta1 adam_beta2 adam_eps random_flip tokenizer cond_text init_checkpoint
report_to validation_prompts max_train_samples dry_run log_dir clip_resume_checkpoint""".split()
PUBLIC_CLASSIFIER = """image_size classifier_width classifier_depth classifier_enc_attn_dim
classifier_attention_resolutions classifier_use_scale_shift_norm classifier_resblock_updown
noised text_length use_fp16 iterations lr weight_decay batch_size microbatch anneal_lr
eval_interval save_interval data_dir val_data_dir index_dir index_dir_val warmup_steps
clip_resume_checkpoint""".split()
PUBLIC_SAMPLE = """model_path classifier_path classifier_scale guidance_scale prompts data_dir
num_samples timestep_respacing use_ddim seed grid_size save_png rerank low_res clip_denoised
batch_size index_dir""".split()


def test_readme_commands_parse() -> None:
    run = parse_run(GeneratorRun, README_GENERATOR.split())
    assert run.data.data_dir == ["path/to/images"]
    assert (run.unet.num_channels, run.text.enc_attn_dim, run.text.text_length) == (128, 512, 48)
    assert run.generator.cond_text and run.precision.use_fp16
    assert (run.train.batch_size, run.train.microbatch, run.optim.lr) == (512, 64, 3e-4)
    clip = parse_run(ClassifierRun, README_CLASSIFIER.split())
    assert (clip.clip.classifier_width, clip.train.iterations) == (128, 300_000)
    sample = parse_sample_run(README_SAMPLE.split())
    assert sample.sample.model_path == ["model_ema.pt"] and sample.sample.use_fp16
    assert sample.stated["num_channels"] == 128 and sample.stated["classifier_depth"] == 2
    assert sample.stated["noise_schedule"] == "cosine" and "dropout" not in sample.stated
    assert parse_sample_run(["--model_path", "a.pt", "--prompts", "x"]).stated == {}
    assert parse_sample_run(["--no_cond_text"]).stated == {"cond_text": False}


def readme_commands() -> list[tuple[str, list[str]]]:
    """Script and flags of every command in README.md, its shell variables filled in."""
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    commands, variables = [], {"NUM_GPUS": "2"}
    for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[found[1]] = found[2]
            elif found := re.search(r"python scripts/(\w+)\.py (.*)", line):
                argv = shlex.split(string.Template(found[2]).substitute(variables), comments=True)
                commands.append((found[1], [word for word in argv if word != "..."]))
    return commands


PARSERS = {
    "train_generator": lambda argv: parse_run(GeneratorRun, argv),
    "train_classifier": lambda argv: parse_run(ClassifierRun, argv),
    "sample": parse_sample_run,
    "make_demo_data": lambda argv: DemoDataConfig(**Parser([DemoDataConfig]).parse(argv)),
    "pack_dataset": lambda argv: PackConfig(**Parser([PackConfig]).parse(argv)),
    "inspect_data": Parser([InspectConfig, OrderConfig]).parse,
}


def test_commands_of_our_readme_parse_and_train_on_captions() -> None:
    commands = readme_commands()
    assert {name for name, _ in commands} == set(PARSERS)
    runs = [PARSERS[name](argv) for name, argv in commands]
    generators = [run for run in runs if isinstance(run, GeneratorRun)]
    assert len(generators) > 3 and all(run.captions is not None for run in generators)


@pytest.mark.parametrize(
    ("parse", "names"),
    [
        (lambda argv: parse_run(GeneratorRun, argv), PUBLIC_GENERATOR),
        (lambda argv: parse_run(ClassifierRun, argv), PUBLIC_CLASSIFIER),
        (parse_sample_run, PUBLIC_SAMPLE),
    ],
)
def test_every_public_flag_is_known(parse, names, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in names if f"--{name}" not in shown] == []


@pytest.mark.parametrize("spelling", [["--use_fp16"], ["--use_fp16", "True"], ["--use_fp16=true"]])
def test_a_boolean_takes_a_value_or_nothing(spelling) -> None:
    assert parse_run(GeneratorRun, spelling).precision.use_fp16


def test_lists_and_aliases() -> None:
    run = parse_run(
        GeneratorRun,
        ["--ema_rate", "0.9999,0.999", "--index_dir", "a", "b", "--channel_mult", "1,2"],
    )
    assert run.train.ema_rate == (0.9999, 0.999)
    assert run.data.data_dir == ["a", "b"]
    assert run.unet.channel_mult == (1, 2)
    assert parse_run(GeneratorRun, ["--index_dir_val", "c"]).data.val_data_dir == ["c"]
    for alias in ("--resume_checkpoints", "--clip_resume_checkpoint"):
        assert parse_run(ClassifierRun, [alias, "a.pt"]).train.resume_checkpoint == "a.pt"
    assert parse_sample_run(["--index_dir", "d"]).sample.data_dir == ["d"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num_chanels", "3"], "unknown argument --num_chanels; did you mean --num_channels"),
        (["--num_chan", "3"], "unknown argument --num_chan"),
        (["--lr", "fast"], "--lr"),
        (["--lr", "-1"], "--lr is -1.0: it must be positive"),
        (["--preset", "bas-64"], "did you mean base-64"),
        (["--preset"], "--preset: expected one argument"),
        (["--preset", "base-clip"], "is no generator preset"),
        (["--small_size", "48"], "small_size"),
        (["--noise_schedule", "flow"], "--prediction is 'eps': it must be x0, v, edm or flow"),
        (["--config", "missing.yaml"], "missing.yaml cannot be read"),
        (["stray"], "unknown argument stray"),
    ],
)
def test_wrong_values_stop_in_one_line(argv, message) -> None:
    with pytest.raises(UsageError) as caught:
        parse_run(GeneratorRun, argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_rate_that_ends_at_0_ends_the_run() -> None:
    with pytest.raises(UsageError, match="--lr_anneal_steps is 50.*reach --iterations.* 50"):
        parse_run(GeneratorRun, ["--lr_anneal_steps", "50", "--iterations", "51"])
    parse_run(GeneratorRun, ["--lr_anneal_steps", "50", "--iterations", "50"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["--predict_xstart", "True"], ["--prediction", "x0"]),
        ([], ["--channel_mult", "1,2,3,4"]),
        ([], ["--noise_schedule", "cosine"]),
    ],
)
def test_two_spellings_are_one_run(one: list[str], other: list[str]) -> None:
    assert parse_run(GeneratorRun, one) == parse_run(GeneratorRun, other)


@pytest.mark.parametrize(
    ("flags", "mult"),
    [
        ("--image_size 512 --small_size 128", (1, 1, 2, 2, 4, 4)),
        ("--image_size 512 --small_size 128 --channel_mult 1,2", (1, 2)),
        ("--image_size 512", (0.5, 1, 1, 2, 2, 4, 4)),
        ("--image_size 256 --small_size 64", (1, 1, 2, 2, 4, 4)),
    ],
)
def test_upsamplers_have_adms_multipliers(flags: str, mult: tuple[float, ...]) -> None:
    run = parse_run(GeneratorRun, flags.split())
    assert run.unet.channel_mult == mult
    assert from_flat(GeneratorRun, to_flat(run)) == run


def test_the_published_upsampler_has_four_heads_at_every_width() -> None:
    unet = parse_run(GeneratorRun, ["--preset", "adm-up-256"]).unet
    assert [unet.heads(channels, going_up=True) for channels in (384, 768)] == [4, 4]


def test_heads_are_counted_where_their_number_is_given() -> None:
    def heads(*flags: str) -> int:
        return parse_run(GeneratorRun, list(flags)).unet.heads(256, going_up=False)

    assert heads() == 4  # 64 channels each
    assert heads("--num_heads", "8") == heads("--num_head_channels", "32") == 8
    assert heads("--num_heads", "8", "--num_head_channels", "64") == 4  # as in guided-diffusion
    assert heads("--num_head_channels", "-1") == 4


def test_help_shows_where_values_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_run(GeneratorRun, ["--preset", "tiny-64", "--help"])
    shown = capsys.readouterr().out
    assert "--preset" in shown and "--config" in shown and "--lr" in shown


def test_stopping_early_needs_held_out_data() -> None:
    with pytest.raises(UsageError, match="--stop_early is 3: it must go with --val_data_dir"):
        parse_run(ClassifierRun, ["--stop_early", "3"])
    assert parse_run(ClassifierRun, ["--stop_early", "3", "--val_data_dir", "d"]).task.stop_early


def test_preset_then_file_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("batch_size: 7\nlr: 1.0e-5\nema_rate: 0.9,0.99\nchannel_mult: [1, 2]\n")
    argv = ["--preset", "base-64", "--config", str(path), "--lr", "0.5"]
    run = parse_run(GeneratorRun, argv)
    assert (run.unet.dropout, run.train.batch_size, run.optim.lr) == (0.1, 7, 0.5)
    assert run.train.ema_rate == (0.9, 0.99) and run.unet.channel_mult == (1, 2)
    path.write_text("batch_sise: 7\n")
    with pytest.raises(UsageError, match="no such key: batch_sise; did you mean batch_size"):
        parse_run(GeneratorRun, argv)


def test_a_global_batch_is_shared_among_the_ranks() -> None:
    train = TrainConfig(global_batch_size=96, batch_size=7)
    assert [train.on_ranks(ranks).batch_size for ranks in (1, 2, 48)] == [96, 48, 2]
    assert TrainConfig(batch_size=7).on_ranks(5).batch_size == 7
    with pytest.raises(UsageError, match="--global_batch_size is 96: .* a multiple of 64 ranks"):
        train.on_ranks(64)


def test_a_table_of_datasets_stands_in_a_file_or_a_flag(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("datasets:\n  a: {root: /a, length: 3}\n  b: /b\ndata_dir: [a=0.7, b=0.3]\n")
    run = parse_run(GeneratorRun, ["--config", str(path)])
    assert run.data.datasets == {"a": {"root": "/a", "length": 3}, "b": "/b"}
    assert run.data.data_dir == ["a=0.7", "b=0.3"]
    assert parse_run(GeneratorRun, ["--datasets", '{"b": "/b"}']).data.datasets == {"b": "/b"}
    path.write_text("datasets: [a, b]\n")
    with pytest.raises(UsageError, match="datasets cannot be"):
        parse_run(GeneratorRun, ["--config", str(path)])


def test_a_file_may_name_the_preset_but_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: tiny-256\nlr: 1e-5\n")
    run = parse_run(GeneratorRun, ["--config", str(path)])
    assert (run.image_size, run.generator.small_size, run.optim.lr) == (256, 64, 1e-5)
    assert parse_run(GeneratorRun, ["--config", str(path), "--preset", "tiny-64"]).image_size == 64
    for line, message in (("preset: tiny-25", "tiny-25"), ("config: b.yaml", "another file")):
        path.write_text(line)
        with pytest.raises(UsageError, match=message):
            parse_run(GeneratorRun, ["--config", str(path)])


def test_one_value_in_a_file_is_a_list_of_one_and_no_row_of_letters(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("index_dir: shards\nema_rate: 0.99\nattention_resolutions: 16\nlr: 3e-4\n")
    run = parse_run(GeneratorRun, ["--config", str(path)])
    assert run.data.data_dir == ["shards"] and run.train.ema_rate == (0.99,)
    assert run.unet.attention_resolutions == (16,) and run.optim.lr == 3e-4
    path.write_text("index_dir: [a, b]\nema_rate: [0.9, 0.99]\ntokenizer: null\n")
    run = parse_run(GeneratorRun, ["--config", str(path)])
    assert run.data.data_dir == ["a", "b"] and run.train.ema_rate == (0.9, 0.99)


@pytest.mark.parametrize(
    "line",
    [
        "attention_resolutions: full",
        "lr: fast",
        "batch_size: null",
        "iterations: 2.5",
        "text_length: [48]",
        "learn_sigma: maybe",
        "data_dir: {a: 0.5}",
        "no_cond_text: true",
    ],
)
def test_wrong_values_in_a_file_stop_in_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(line)
    with pytest.raises(UsageError, match=f"run.yaml.*{line.split(':')[0]}") as caught:
        parse_run(GeneratorRun, ["--config", str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_survives_json(name: str) -> None:
    run_class = GeneratorRun if PRESETS[name][0] == "generator" else ClassifierRun
    run = parse_run(run_class, ["--preset", name])
    assert from_flat(run_class, json.loads(json.dumps(to_flat(run)))) == run


def test_unknown_keys_of_a_newer_version_are_refused() -> None:
    flat = to_flat(parse_run(GeneratorRun, [])) | {"wormhole": 1}
    with pytest.raises(UsageError, match="wormhole"):
        from_flat(GeneratorRun, flat)


RETIRED = {
    "prediction": "x0",
    "predict_xstart": False,
    "sigma_small": True,
    "use_kl": False,
    "rescale_learned_sigmas": False,
    "sample_interval": 500,
    "num_preview": 2,
    "validation_prompts": None,
}


def test_a_classifier_takes_only_flags_that_it_reads() -> None:
    run = parse_run(ClassifierRun, [])
    assert not RETIRED.keys() & to_flat(run).keys()
    assert {"noise_schedule", "rescale_timesteps", "schedule_sampler"} <= to_flat(run).keys()
    for flag in RETIRED:
        with pytest.raises(UsageError, match=f"unknown argument --{flag}"):
            parse_run(ClassifierRun, [f"--{flag}", "1"])


def test_a_classifier_from_before_goes_on() -> None:
    """Its checkpoint carries flags that were accepted and never read."""
    run = parse_run(ClassifierRun, ["--image_size", "64"])
    assert from_flat(ClassifierRun, to_flat(run) | RETIRED) == run
    data = RunData(batches=None, tokenizer=None, fingerprint="")
    record = make_record(run, data)
    assert record.changed(to_flat(run) | RETIRED, record.shaping & record.config.keys()) == []
    generator = parse_run(GeneratorRun, [])
    assert from_flat(GeneratorRun, to_flat(generator) | RETIRED).process.prediction == "x0"


def test_run_time_choices_do_not_shape_weights() -> None:
    names = shaping_fields()
    assert {"num_channels", "noise_schedule", "text_length", "classifier_width"} <= names
    assert "sigma_small" in names  # the checkpoint decides it: sampling compares, never ignores
    assert not {"dropout", "use_checkpoint", "lr", "batch_size", "use_fp16"} & names


def test_every_knob_explains_itself() -> None:
    sections = [SampleConfig, DemoDataConfig, ConvertConfig]
    sections += [ShapesConfig, UpsamplerConfig, CurvesConfig]
    for run_class in (GeneratorRun, ClassifierRun):
        run = parse_run(run_class, [])
        sections += [type(getattr(run, part.name)) for part in dataclasses.fields(run)]
    for section in sections:
        for field in dataclasses.fields(section):
            assert field.metadata["help"], field.name
