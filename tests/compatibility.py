"""The rows of docs/compatibility.md: what a user may combine OptForge with.

A test says what comes of a combination by `@pytest.mark.compatibility("row", stages=(2, 3), verdict="exact")`. Without
``stages``, the test's parameter ``stage`` says for which column it stands. A row without a test is an error
(tests/test_compatibility.py), so a new one comes together with its test.
"""

# As DeepSpeed counts ZeRO's stages; OFFLOAD stands for offload_optimizer.device: cpu, on any stage.
OFFLOAD = "offload"
COLUMNS: tuple[int | str, ...] = (0, 1, 2, 3, OFFLOAD)
VERDICTS = ("exact", "refused", "not testable here")

# By heading, in the order of the page: a key for the marker, and how the page calls the row.
BY_SUBJECT: dict[str, dict[str, str]] = {
    "Frameworks": {
        "deepspeed": "DeepSpeed, JSON and `register` or `initialize`",
        "accelerate": "Accelerate",
        "trainer": "Hugging Face Trainer",
    },
    "Parallelism": {
        "data": "Data parallelism, 1 to 4 ranks",
        "autotp": "Tensor parallelism: AutoTP, 2 and 4 ranks, with data parallelism",
        "megatron": "Tensor parallelism: layers in the manner of Megatron, with an mpu",
        "moe": "DeepSpeed MoE layers, `ep_size` 1 and 2",
        "pipeline": "PipelineModule, 2 and 3 stages, 1 and 2 data ranks",
        "pipeline_tied": "PipelineModule with an embedding tied to the head (TiedLayerSpec)",
        "pipeline_checkpoints": "PipelineModule: portable checkpoints to other numbers of stages and ranks, `convert`",
    },
}
ROWS: dict[str, str] = {key: row for subject in BY_SUBJECT.values() for key, row in subject.items()}
