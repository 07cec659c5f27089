"""A network in each kind of file that can stand in the place of a checkpoint."""

import onnx
import torch


def convolution(inputs=2, classes=4):
    torch.manual_seed(0)
    return torch.nn.Conv3d(inputs, classes, 3, padding=1).eval()


def save_onnx(path, inputs=2, classes=4, size=("x", "y", "z")):
    """That convolution as the smallest ONNX file."""
    weight, bias = (p.detach().numpy() for p in convolution(inputs, classes).parameters())
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["image", "weight", "bias"], ["pred"], pads=[1] * 6)],
        "convolution",
        [value("image", onnx.TensorProto.FLOAT, ["batch", inputs, *size])],
        [value("pred", onnx.TensorProto.FLOAT, ["batch", classes, *size])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)


def save_torchscript(path, network):
    torch.jit.script(network).save(path)


def save_all(directory, network):
    """The network as a checkpoint and as TorchScript, and a convolution as ONNX."""
    torch.save(network.state_dict(), directory / "model.pt")
    save_torchscript(directory / "model.ts", network)
    save_onnx(directory / "model.onnx")
    return directory
