import pytest
import torch
from tests.distributed import teams
from tests.distributed.conftest import Pools
from tests.oracles import EXACT

PARAMS = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 0.001}}
SQUARE, WIDE, TALL = (256, 256), (256, 512), (512, 256)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shapes", [[SQUARE], [SQUARE, WIDE], [TALL]], ids=["one", "two", "tall"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_first(stage, shapes, exact, pools: Pools) -> None:
    params = {**PARAMS, **(EXACT if exact else {})}
    expected = teams.one_process(shapes, params, 3)
    results = pools[4].run(teams.train, stage, shapes, params, 3)
    print([r["flops"] for r in results], [r["sent"] for r in results])
    for r in results:
        for name, p in r["parameters"].items():
            e = expected[name]
            print(name, ((p-e).norm()/e.norm()).item())
