#!/bin/sh
# The main job on a network that ships with the project: make demo
set -eu
bin=$1
out=demo
arch="--arch examples/digits.py:digits_resnet"
run() {
    printf '\n$ %s\n' "$*"
    "$bin/$@"
}
rm -rf $out && mkdir $out && cp examples/digits.pt $out/digits.pt

run normrewrite inspect $out/digits.pt $arch
run normrewrite convert $out/digits.pt $arch --to l1 --input-shape 8,1,8,8
run normrewrite verify $out/digits.pt $out/digits.l1.pt $arch --data examples/digits.npz
run normrewrite export $out/digits.l1.pt $arch --input-shape 1,1,8,8 -o $out/digits.l1.onnx
run normrewrite verify $out/digits.pt $out/digits.l1.onnx $arch --data examples/digits.npz
run normrewrite revert $out/digits.l1.pt $arch
run normrewrite verify $out/digits.pt $out/digits.l1.reverted.pt $arch --data examples/digits.npz
printf '\nThe files are in %s/.\n' $out
