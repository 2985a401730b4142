"""cuDNN's graphs: their descriptions, how rarely a new pack builds one, and that larger ones give exact results."""

import contextlib
import inspect
import re
import types

import pytest
import torch

from hf_flashcp.attention.kernels import BackwardInputs, CudnnKernel, ScoreOptions
from hf_flashcp.attention.kernels.cudnn_graphs import SPARE_BLOCKS, GraphKey, Sizes, graph_for
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.layout import Rectangle
from hf_flashcp.plan.rectangles import rank_rectangles
from hf_flashcp.planning import plan_documents
from tests import cudnn_stand_in
from tests.kernel_cases import FP64, difference, make, run, textbook
from tests.vendor_kernels import signature


META, WARM_UP, PACKS, MOST_BUILDS = torch.device("meta"), 20, 200, 12
HEADS, KV_HEADS, DIM = 32, 8, 128
RANK = 3
SIZES = Sizes(batch=5, max_queries=700, max_keys=3000, total_queries=2000, total_keys=9000)


def key(backward, **changes):
    steps = ((32, 8),) * (5 if backward else 3)
    made = GraphKey(backward, torch.bfloat16, 4, 2, 16, 16, steps, True, None, 0.3, False, META)
    return made._replace(**changes)


def test_a_new_pack_rarely_builds_a_graph(monkeypatch):
    """Over 200 packs of 128K tokens on 8 ranks, at most 12 graphs are built after the first 20 packs."""
    with cudnn_stand_in.cudnn() as cudnn:
        monkeypatch.setattr(cudnn_stand_in.Graph, "execute", lambda *arguments: None)  # meta tensors have no values
        builds = []
        for seed in range(PACKS):
            plan = plan_documents(sample_pack("pile", 131072, seed=seed), 8)
            run_layer(*rank_rectangles(plan)[RANK], plan.report()["tokens"][RANK])
            builds.append(cudnn.builds)
    assert builds[-1] - builds[WARM_UP] <= MOST_BUILDS < builds[WARM_UP]


def run_layer(local, stages, rows):
    """Run the kernel calls of a rank with so many rows in one layer, forward and backward, on meta tensors."""
    kernel = CudnnKernel()
    query, grad_out = (torch.empty(rows, HEADS, DIM, dtype=torch.bfloat16, device=META).transpose(0, 1) for _ in "12")
    lse = torch.empty(HEADS, rows, device=META)
    for rectangles, causal in ((local, True), *((stage, False) for stage in stages)):
        keys = max(rectangle.k_stop for rectangle in rectangles)
        packed = torch.empty(keys, KV_HEADS, 2 * DIM, dtype=torch.bfloat16, device=META).transpose(0, 1)
        key, value = packed.split(DIM, dim=2)
        options = ScoreOptions(causal, DIM**-0.5)
        kernel.forward(query, key, value, rectangles, options)
        inputs = BackwardInputs(grad_out, query, key, value, query, lse)
        kernel.backward(inputs, rectangles, options)


def test_bounds_are_rounded_up_and_the_axis_without_blocks_coarsely():
    assert SIZES.rounded(backward=False) == (8, 1024, 65536, 0, 0)
    assert SIZES.rounded(backward=True) == (8, 65536, 4096, 16384, 16384)
    assert Sizes(9, 2, 1, 2, 1).rounded(backward=False) == (16, 512, 65536, 0, 0)
    assert Sizes(9, 2, 70000, 2, 70000).rounded(backward=True) == (16, 65536, 131072, 16384, 131072)
    assert SIZES.rounded(False).blocks(False) == 8 * 8 and SIZES.rounded(True).blocks(True) == 8 * 32


@pytest.mark.parametrize("backward", [False, True])
def test_a_larger_graph_is_used_again_unless_it_starts_many_more_blocks(backward):
    with cudnn_stand_in.cudnn() as cudnn:
        large = graph_for(key(backward), SIZES)
        assert graph_for(key(backward), SIZES._replace(batch=1, max_queries=3, total_queries=3)) is large
        assert cudnn.builds == 1
        assert graph_for(key(backward), SIZES._replace(batch=9)) is not large  # does not fit
        assert graph_for(key(backward, causal=False), SIZES) is not large
        assert cudnn.builds == 3
        longest = {"max_keys": 2**20, "total_keys": 2**20} if backward else {"max_queries": 2**20}
        huge = graph_for(key(backward), SIZES._replace(**longest))
        assert 4 * huge.sizes.blocks(backward) > SPARE_BLOCKS
        assert graph_for(key(backward), SIZES) is large and cudnn.builds == 4


def test_results_are_exact_with_a_graph_for_more_and_longer_sequences():
    """Sequences that are missing in the batch are empty, and rows after the end of a sequence are not touched."""
    large = [Rectangle(row, row + 40, row, row + 40) for row in range(0, 280, 40)]
    small = [Rectangle(2, 5, 3, 9), Rectangle(9, 30, 9, 40)]
    with cudnn_stand_in.cudnn() as cudnn:
        for rectangles in (large, small, large[:1]):
            inputs = make((4, 2, 16, 16), rectangles)
            ours = run(CudnnKernel(), inputs, rectangles, causal=True)
            assert difference(ours, textbook(inputs, rectangles, causal=True)) < FP64
    assert cudnn.builds == 2, "one graph for forward, one for backward"
    assert cudnn.forwards == cudnn.backwards == 3


def test_the_stand_in_has_the_signatures_of_the_real_package():
    """The package can be imported on any machine; only building a graph needs cuDNN."""
    cudnn = pytest.importorskip("cudnn")
    assert cudnn.__version__.startswith("1.18.")
    for name, ours in (("sdpa", cudnn_stand_in.SDPA), ("sdpa_backward", cudnn_stand_in.SDPA_BACKWARD)):
        documented = getattr(cudnn.pygraph, name).__doc__.splitlines()[0]
        theirs = re.findall(r"[(,] (\w+): ", documented)
        assert theirs == list(signature(ours).parameters), name
    parameters = {
        "__init__": re.findall(r"[(,] (\w+): ", cudnn.pygraph.__init__.__doc__.splitlines()[0]),
        "tensor": list(inspect.signature(cudnn.pygraph.tensor).parameters),
        "execute": list(inspect.signature(cudnn.pygraph.execute).parameters),
    }
    for name, theirs in parameters.items():
        ours = [each for each in inspect.signature(getattr(cudnn_stand_in.Graph, name)).parameters if each != "self"]
        assert set(ours) - {"buffers"} <= set(theirs), name
    for theirs, ours in ((cudnn.tensor, cudnn_stand_in.Tensor), (cudnn.pygraph, cudnn_stand_in.Graph)):
        assert {name for name in vars(ours) if name.startswith(("set_", "build", "check", "create"))} <= set(
            dir(theirs)
        )
    for theirs, ours in (
        (cudnn.data_type, cudnn_stand_in.DataType),
        (cudnn.diagonal_alignment, cudnn_stand_in.Alignment),
        (cudnn.heur_mode, cudnn_stand_in.HeurMode),
    ):
        assert {member.name for member in ours} <= set(dir(theirs))


def test_the_stream_of_the_call_is_set_on_a_gpu(monkeypatch):
    streams = []
    with cudnn_stand_in.cudnn():
        import cudnn

        cudnn.set_stream = lambda handle, stream: streams.append(stream)
        monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
        graph = graph_for(key(False), SIZES)
        monkeypatch.setattr("torch.empty", lambda *args, **kwargs: torch.zeros(1024, dtype=torch.uint8))
        monkeypatch.setattr(type(graph.graph), "execute", lambda *arguments: None)
        graph.run({}, torch.device("cuda"))
    assert streams == [77]
