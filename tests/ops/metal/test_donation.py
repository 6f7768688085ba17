"""Test that a primitive with several outputs can be donated an input, which the gradient in place of the chunk depends on.

MLX has no GPU here, so a primitive for the CPU stands for the launcher's. It calls the same function of csrc/metal/donation.h, and MLX's evaluation
is the same for both.
"""

import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[3]
MLX = Path(mx.__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")

# Prints, for 1, 2 and 6 outputs, whether the first input may be overwritten, and whether it may if someone else still holds it.
PROGRAM = """
#include <cstdio>

#include "metal/donation.h"
#include "mlx/allocator.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mx = mlx::core;

struct Probe : mx::Primitive {
  explicit Probe(mx::Stream s) : mx::Primitive(s) {}
  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    RELEASE;
    std::printf("%d", int(inputs[0].is_donatable()));
    for (auto& output : outputs) output.set_data(mx::allocator::malloc(output.nbytes()));
  }
  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {}
  const char* name() const override { return "Probe"; }
};

int main() {
  const auto s = mx::default_stream(mx::Device::cpu);
  for (int keep : {0, 1}) {
    for (int n : {1, 2, 6}) {
      const mx::Shape shape{1 << 10};
      std::vector<mx::array> outputs, kept;
      {
        auto chunk = mx::exp(mx::full(shape, 1.0f, s), s);
        if (keep) kept.push_back(chunk);
        std::vector<mx::array> rows{mx::contiguous(chunk, false, s)};
        outputs = mx::array::make_arrays(std::vector<mx::Shape>(n, shape), std::vector<mx::Dtype>(n, mx::float32), std::make_shared<Probe>(s), rows);
      }
      mx::eval(outputs);
    }
    std::printf(" ");
  }
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


def probed(folder, release):
    (folder / "probe.cpp").write_text(PROGRAM)
    includes = [f"-I{ROOT / 'csrc'}", f"-isystem{MLX / 'include'}"]
    libraries = [f"-L{MLX / 'lib'}", "-lmlx", f"-Wl,-rpath,{MLX / 'lib'}"]
    build = [COMPILER, "-std=c++20", "-O0", f"-DRELEASE={release}", *includes, folder / "probe.cpp", *libraries, "-o", folder / "probe"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return subprocess.run([folder / "probe"], capture_output=True, text=True, check=True).stdout.split()


def test_mlx_donates_no_input_to_several_outputs(tmp_path):
    """If this fails, MLX does it by itself: donation.h can go."""
    assert probed(tmp_path, "(void)0") == ["100", "000"]


def test_inputs_that_nothing_else_needs_are_donated(tmp_path):
    assert probed(tmp_path, "metalens::release_inputs_of_siblings(inputs, outputs)") == ["111", "000"]


def test_the_launcher_releases_before_it_allocates():
    text = (ROOT / "csrc" / "metal" / "launcher.cpp").read_text()
    assert 0 < text.index("release_inputs_of_siblings(inputs, outputs);") < text.index("allocate(outputs[i]")
