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
    "Devices": {
        "cpu": "CPU, gloo",
        "cuda": "CUDA: one device, and two ranks that share it over gloo (`make test-gpu`)",
        "nccl": "CUDA: 2 and 4 devices, NCCL (`make test-gpu`)",
    },
    "Frameworks": {
        "deepspeed": "DeepSpeed, JSON and `register` or `initialize`",
        "accelerate": "Accelerate",
        "trainer": "Hugging Face Trainer",
        "peft": "PEFT: LoRA, DoRA, LoRA of embeddings, QLoRA (bitsandbytes' 4 bits)",
        "trl": "TRL: SFT, DPO and Reward with adapters",
        "lightning": "Lightning, DeepSpeedStrategy (`make test-frameworks`)",
        "ray": "Ray Train (`make test-frameworks`)",
        "llama_factory": "LLaMA-Factory (`make test-frameworks`)",
        "swift": "ms-swift (`make test-frameworks`)",
    },
    "Parallelism": {
        "data": "Data parallelism, 1 to 4 ranks",
        "autotp": "Tensor parallelism: AutoTP, 2 and 4 ranks, with data parallelism",
        "megatron": "Tensor parallelism: layers in the manner of Megatron, with an mpu",
        "tensor_checkpoints": "Tensor parallelism: portable checkpoints to other numbers of tensor ranks",
        "moe": "DeepSpeed MoE layers, `ep_size` 1 and 2",
        "pipeline": "PipelineModule, 2 and 3 stages, 1 and 2 data ranks",
        "pipeline_tied": "PipelineModule with an embedding tied to the head (TiedLayerSpec)",
        "pipeline_checkpoints": "PipelineModule: portable checkpoints to other numbers of stages and ranks, `convert`",
        "pipeline_tensor": "PipelineModule with tensor ranks (`PipeModelDataParallelTopology`), 2 stages of 2 and 4 ranks",
        "pipeline_tensor_checkpoints": "The same: portable checkpoints (`engine.save_checkpoint` is exact)",
        "pipeline_autotp": "PipelineModule with AutoTP, which DeepSpeed does not build",
        "autoep": "AutoEP (`expert_parallel`), `autoep_size` 1, 2 and 4",
        "autoep_tensor": "AutoEP beside AutoTP",
        "autoep_tensor_checkpoints": "AutoEP beside AutoTP: portable checkpoints (`engine.save_checkpoint` is exact)",
        "autoep_one": "AutoEP with `autoep_size` 1 beside AutoTP, which DeepSpeed does not build",
        "autoep_object": "AutoEP with an optimizer object (a function of the parameters is exact)",
        "autoep_engine_checkpoints": "AutoEP: `engine.save_checkpoint` and `load_checkpoint`",
        "autoep_checkpoints": "AutoEP: portable checkpoints across ranks, stages and `autoep_size`",
        "ulysses": "Sequence parallelism (Ulysses, `DistributedAttention`), by `mpu`",
        "mesh": "Sequence parallelism by `mesh_param` or `data_parallel_size`",
    },
    "ZeRO": {
        "overlap_comm": "`overlap_comm`",
        "contiguous_gradients": "`contiguous_gradients`",
        "reduce_scatter": "`reduce_scatter`",
        "round_robin_gradients": "`round_robin_gradients`",
        "buckets": "`reduce_bucket_size`, `allgather_bucket_size`, `allgather_partitions`, `use_multi_rank_bucket_allreduce`",
        "parameter_alignment": "`parameter_alignment`",
        "ignore_unused_parameters": "`ignore_unused_parameters`",
        "sub_group_size": "`sub_group_size`",
        "persistence": "`stage3_param_persistence_threshold`, `stage3_model_persistence_threshold`",
        "prefetch": "`stage3_prefetch_bucket_size`, `stage3_max_live_parameters`, `stage3_max_reuse_distance`, "
        "`stage3_use_all_reduce_for_fetch_params`, `stage3_allgather_sequential`",
        "memory_efficient_linear": "`memory_efficient_linear`, `override_module_apply`",
        "gather_16bit": "`stage3_gather_16bit_weights_on_model_save`",
        "hpz": "hpZ (`zero_hpz_partition_size`)",
        "mics": "MiCS (`mics_shard_size`), which older DeepSpeed has",
        "leaf": "Leaf modules (`set_z3_leaf_modules`, `leaf_module`)",
        "offload_param": "`offload_param.device`: cpu",
        "offload_pipeline": "`offload_optimizer.pipeline_read`, `pipeline_write`, `fast_init`",
        "ratio": "`offload_optimizer.ratio` below 1",
        "super_offload": "SuperOffload (`offload_optimizer.super_offload`)",
        "nvme": "NVMe (`offload_optimizer.device`, `offload_param.device`: nvme)",
        "zenflow": "ZenFlow (`zenflow`)",
        "zeropp": "ZeRO++ quantization (`zero_quantized_weights`, `_gradients`, `_nontrainable_weights`)",
        "legacy": "`legacy_stage1`, `elastic_checkpoint`",
    },
    "Gradients and precision": {
        "prescale_gradients": "`prescale_gradients`, `gradient_predivide_factor`",
        "scaled": "The same with `reduce_scatter`, DeepSpeed's default",
        "scaled_3": "`gradient_predivide_factor` without `prescale_gradients`, on ZeRO-3",
        "gradient_allreduce_op": "`gradient_allreduce_op`: sum",
        "communication_data_type": "`communication_data_type`: fp32, bf16, fp16",
        "grad_accum_dtype": "`data_types.grad_accum_dtype`: fp32, bf16",
        "gradient_accumulation_steps": "`gradient_accumulation_steps`",
        "torch_autocast": "`torch_autocast`",
        "low_masters": "`bf16_master_weights_and_grads`, `bf16_optimizer_states`, `fp16_master_weights_and_grads`",
    },
    "Beside the training": {
        "load_universal": "`checkpoint.load_universal`",
        "deepcompile": "DeepCompile (`compile.deepcompile`)",
        "hybrid_engine": "Hybrid engine",
        "activation_checkpointing": "`activation_checkpointing`",
        "data_efficiency": "`data_efficiency`",
        "profilers": "`flops_profiler`, `comms_logger`, `wall_clock_breakdown`, `memory_breakdown`",
    },
}
ROWS: dict[str, str] = {key: row for subject in BY_SUBJECT.values() for key, row in subject.items()}
