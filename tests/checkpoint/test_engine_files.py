"""Files of engine.save_checkpoint are read without running code from them, whichever Python wrote them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ds_optforge import CheckpointError
from ds_optforge.checkpoint.engine_files import load


class Attribute:
    """Is pickled as ``getattr(owner, name)``, as Python 3.11.0 to 3.11.3 pickles the member of an enumeration."""

    def __init__(self, owner: Any, name: str) -> None:
        self.reduced = getattr, (owner, name)

    def __reduce__(self) -> Any:
        return self.reduced


def test_a_member_of_deepspeeds_enumeration_may_be_written_by_name(tmp_path: Path) -> None:
    torch.save({"zero_stage": Attribute(ZeroStageEnum, "gradients")}, tmp_path / "states.pt")
    assert load(tmp_path / "states.pt") == {"zero_stage": ZeroStageEnum.gradients}


def test_no_other_attribute_is_read(tmp_path: Path) -> None:
    torch.save({"zero_stage": Attribute(LossScaler, "backward")}, tmp_path / "states.pt")
    with pytest.raises(CheckpointError, match=r"states\.pt: cannot be read"):
        load(tmp_path / "states.pt")
