"""What this project promises to its users. A test shows one of these by ``@pytest.mark.promise("its-key")``.

docs/promises.md lists each with the tests that show it. A promise without a test is an error (tests/test_promises.py), so a
new one comes together with its test.
"""

# By heading, in the order of the page: a key for the marker, and the promise itself.
BY_SUBJECT: dict[str, dict[str, str]] = {
    "Choosing an optimizer": {
        "choose-by-name": "One field, `name`, chooses the optimizer.",
        "unknown-name": "A name that is unknown is an error that lists the known ones.",
        "validated-fields": "Every field is validated, and a message says which one is wrong, what was found there and what is "
        "allowed.",
        "unread-field": "A field that the chosen optimizer does not read is an error.",
        "one-config": "Optimizer and learning-rate schedule are built from one configuration.",
        "frozen-parameters": "Parameters that are frozen, and so all that hold integers, are left out; trainable "
        "complex numbers are refused by name.",
        "no-matrix": "Muon for a model that has no matrix for it trains all of it with AdamW, and says so.",
        "client-optimizer": "DeepSpeed finds the optimizers by name in its configuration, and takes them as objects.",
    },
    "AdamW and Lion": {
        "adamw-is-torchs": "AdamW trains as `torch.optim.AdamW` does.",
        "adamw-fused": "AdamW runs as torch's fused kernel.",
        "adamw-8bit": "`adamw_8bit` is AdamW with 8-bit state, and trains as the one of bitsandbytes does.",
        "lion-formula": "Lion follows its sign formula, with exactly one buffer of state.",
        "lion-no-eps": "Lion takes no `eps`.",
    },
    "Muon": {
        "muon-scale": "Muon's update of a matrix with m rows and n columns is scaled by √max(1, m / n).",
        "muon-defaults": "Muon's defaults are those of the original: momentum 0.95, Nesterov, five Newton-Schulz steps.",
        "muon-settings": "Muon's momentum, Nesterov and number of Newton-Schulz steps can be set, and take effect.",
        "muon-aspect-ratio": "A matrix goes to Muon if its longer side is at most 10 times the shorter one, else to AdamW; a "
        "known hidden linear map goes to Muon at any ratio, unless the configuration sets a limit.",
        "muon-counts": "One line of the log says how many parameters Muon trains, and how many AdamW does.",
        "muon-convolutions": "The filters of a convolution are one matrix, of outputs by all the rest.",
        "adamw-beside-curve": "AdamW's learning rate beside Muon follows the curve of the same schedule.",
        "adamw-beside-rate": "AdamW's learning rate beside Muon has an initial value of its own, Muon's if nothing is said.",
        "lr-transfer": "With the scales `shape` and `spectral` Muon's best learning rate was measured to stay put, to less "
        "than a factor of 2, as a model grows eight times as wide (docs/lr_transfer.md); the measurement can be made again.",
        "orthogonalize": "`orthogonalize(G)` can be used on its own.",
    },
    "Parameter groups in the style of KellerJordan/Muon": {
        "use-muon": "Groups with a flag `use_muon` train as they do with KellerJordan/Muon.",
        "use-muon-missing": "A group without the flag, or with one that is no boolean, is an error that names the group.",
        "use-muon-several": "There may be several groups of each kind, with hyperparameters of their own.",
    },
    "NorMuon, other relatives of Muon, and weight decay": {
        "muon-family-formulas": "Muon², AdaMuon and Aurora, and normalised rows or columns, follow the published algorithms.",
        "normuon-formula": "NorMuon follows the published algorithm.",
        "muon-hyperball-formula": "Muon Hyperball follows the published algorithm.",
        "muon-hyperball-norm": "With Muon Hyperball a matrix keeps the norm with which it started, to float32's rounding.",
        "muown-formula": "Muown follows its authors' code.",
        "soap-muon-formula": "SOAP-Muon follows the code of modded-nanogpt's record 44, without what that record adds.",
        "owners-state": "What owners keep of whole matrices is on them alone, the same bits on every stage; portable "
        "checkpoints, and converted ones, move it to other owners; an engine's own are resumed by the same ones, or refused.",
        "normuon-beta2": "NorMuon's `beta2` has an effect.",
        "normuon-rows": "NorMuon keeps one second moment for each output row of a matrix.",
        "normuon-routing": "NorMuon trains the matrices inside a model; AdamW trains embeddings, norms, biases and the head, "
        "with 8-bit state for what is large if that is wished.",
        "cautious-decay": "Cautious weight decay acts where update and weight have the same sign, and is plain when it is off.",
        "cautious-matrices": "Cautious weight decay stays with the matrices unless it is asked for elsewhere.",
        "decay-schedule": "Weight decay can follow a schedule: constant, linear (1 - progress) or cosine.",
    },
    "Schedule-Free AdamW": {
        "schedule-free-points": "The points x, y and z of Schedule-Free AdamW are those of the reference implementation.",
        "schedule-free-warm-up": "Schedule-Free AdamW's own warm-up ramps the learning rate up.",
        "schedule-free-schedule": "A schedule that decays is refused beside Schedule-Free AdamW.",
        "averaged-round-trip": "Putting the averaged weights in and taking them out again leaves the training weights as they "
        "were, bit for bit.",
        "averaged-evaluation": "train.py, the HF Trainer with `OptForgeCallback` and `export` take the averaged weights "
        "without being asked; an engine, Accelerate's too, evaluates and exports them within `evaluation_weights`.",
        "averaged-refusal": "A step, or a training checkpoint, while the averaged weights are in is refused.",
    },
    "Around any rule": {
        "average-any-rule": "An average of the weights that any rule trains, exponential or of the last part of a run, is that "
        "of `torch.optim.swa_utils` on every ZeRO stage, in float32 whatever the state format is.",
        "average-checkpoints": "Checkpoints hold that average, on other topologies bit for bit; a run that begins one, or "
        "leaves it out, says so.",
        "ema-nesterov": "EMA-Nesterov around any rule follows its formula on every ZeRO stage, and the weights without "
        "look-ahead are evaluated and exported.",
    },
    "Optimizer state": {
        "state-buffers": "A parameter has one buffer of state with Lion and Muon, and two with AdamW and Schedule-Free AdamW.",
        "8bit-size": "8-bit state is about two bytes a parameter with AdamW, and one with a rule that has only a momentum.",
        "8bit-loss": "The loss with 8-bit state tracks the loss with float32 state.",
    },
    "Roles": {
        "role-rates": "Embeddings, the unembedding, matrices and scalars can each have a learning rate of their own.",
        "role-betas": "Each of these roles can have betas of its own.",
    },
    "Learning-rate schedules": {
        "schedule-shapes": "Schedules are linear, cosine or wsd, with a warm-up given in steps or as a fraction of all steps.",
        "schedule-parts": "The warm-up and the main curve are each optional.",
        "schedule-floor": "The floor is reached exactly in the last step, whatever the warm-up.",
        "schedule-cool-down": "A cool-down leads from wherever the curve is to the floor, without a jump.",
        "schedule-recipe": "Warm-up, warm-down and the final rate can be given as fractions, as in the autoresearch recipe.",
        "schedule-epochs": "The total number of steps may come from the caller: epochs times the length of the loader.",
    },
    "QK-clip": {
        "qk-clip-bound": "QK-clip brings a head's largest attention logit down to tau, and changes no other head.",
        "qk-clip-otherwise": "While no logit is larger than tau, QK-clip changes no bit.",
        "qk-clip-everywhere": "QK-clip does the same on every ZeRO stage, on any number of ranks and with micro-batches.",
        "qk-clip-cost": "QK-clip makes the host wait nowhere, and launches nothing in steps that do not look at logits.",
        "qk-clip-refused": "Attention that QK-clip cannot bound exactly is refused by the name of its module.",
    },
    "ZeRO, ranks and offload": {
        "world-size": "One process and any number of ranks train the same parameters.",
        "zero-stages": "ZeRO 1, 2 and 3 train the same parameters.",
        "teams": "Several ranks orthogonalize a large matrix together where ranks would be idle, and it trains as with one.",
        "tensor-parallel": "A matrix that tensor parallelism has cut is orthogonalized whole, by one of the tensor ranks.",
        "tensor-parallel-checkpoint": "A checkpoint resumes on other numbers of tensor ranks, or without tensor parallelism.",
        "pipeline": "The stages of a DeepSpeed PipelineModule train as one process does, whatever roles each holds.",
        "pipeline-checkpoint": "A pipeline's checkpoint resumes bit for bit, and on other numbers of stages and ranks.",
        "accumulation": "Gradient accumulation gives the parameters that the large batch gives.",
        "clipping": "DeepSpeed's `gradient_clipping` limits the norm of the gradient; 0 turns it off.",
        "offload": "The optimizer can be offloaded to host memory, and trains the same parameters; so it does with "
        "`pin_memory`, as far as a CPU can show, which pins nothing.",
        "sharding-modes": "A matrix is gathered and orthogonalized whole, or each rank orthogonalizes the rows that it holds.",
        "rows": "A step may update the rows of each matrix with the largest momentum alone, by error feedback: the others keep "
        "accumulating, and which rows are chosen depends on no rank or stage.",
        "rows-cost": "Only chosen rows travel and are orthogonalized; bytes and FLOPs fall with their share.",
        "shard-local-error": "Orthogonalizing only the rows that a rank holds is compared with orthogonalizing whole "
        "matrices, in tests and in docs/performance.md.",
    },
    "Files from strangers": {
        "files-from-strangers": "No configuration and no checkpoint runs code, leads out of its folder or takes more memory "
        "than in proportion to its size: what would is an error that names the file (SECURITY.md).",
    },
    "Launching": {
        "deepspeed-launcher": "`deepspeed --num_gpus N train.py --ds_config ds_configs/muon_zero2.json` trains.",
        "accelerate-launch": "`accelerate launch` gives the losses that the deepspeed launcher gives.",
        "trainer-argument": "The HF Trainer's `optimizer_cls_and_kwargs` trains as plain PyTorch does, with CPU offload and "
        "without DeepSpeed.",
        "trainer-log": "With `OptForgeCallback` the HF Trainer's log has every group's learning rate, and the telemetry.",
        "trainer-portable": "With `OptForgeCallback` a portable checkpoint lies in each of the HF Trainer's.",
        "trl-adapters": "The adapters that TRL's trainers make are orthogonalized, and nothing goes to AdamW unasked.",
        "mpi": "MPI jobs, on one host or several, give the losses that the other launchers give.",
    },
    "Installing, and rules of one's own": {
        "wheel": "The package installs from a wheel, and starts without the checkout.",
        "any-rule": "Every registered rule passes one suite of checks on real engines.",
        "external-rule": "A rule of another package works by import or by entry point, and passes the same suite.",
    },
    "Comparisons and sweeps": {
        "fair-comparison": "Optimizers are compared on the same seeds, data, steps and batch, each with its own learning rate.",
        "steady-loss": "The steady-state loss is the mean after 200 steps, or after three times the warm-up if that is longer.",
        "comparison-metrics": "A comparison also reports gradient norm, peak memory, time, and bytes sent for the optimizer.",
        "sweep-file": "A sweep file with all experiments of the autoresearch recipe is shipped.",
        "sweep-order": "Experiments run by priority, those marked to be tried first before all others.",
        "sweep-winner": "The winner of a phase is the baseline of the next one.",
        "sweep-combined": "A last run combines all winners, and is reported against the first baseline.",
        "sweep-grid": "Pairs that may interact can be run as a grid.",
        "sweep-search": "Ranges can be searched by Optuna under the same rules; after an interrupt with the same points.",
        "sweep-budget": "An experiment has a budget of time, and what exceeds its limit is ended.",
    },
}
PROMISES: dict[str, str] = {key: promise for subject in BY_SUBJECT.values() for key, promise in subject.items()}
