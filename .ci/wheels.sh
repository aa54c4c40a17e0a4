#!/usr/bin/env bash
# Makes the files of a release in dist/: the sdist, and from it a wheel for this machine; on Linux also one for aarch64
# where there is a cross compiler. `make wheels` calls it, with the tools of the dependency group `release` on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p dist
rm -f dist/*
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# build_wheel PLATFORM TO: a wheel with that tag, out of the sdist.
build_wheel() {
    rm -rf "$work/source" && mkdir "$work/source"
    tar -xzf dist/*.tar.gz -C "$work/source" --strip-components 1
    FASTRNN_BUILD_CPU=1 FASTRNN_BUILD_CUDA=0 \
        python -m build --wheel --outdir "$2" --config-setting=--build-option=--plat-name="$1" "$work/source"
}

# manylinux ARCHITECTURE: auditwheel finds the oldest tag that the symbols of the library allow, for any architecture.
manylinux() {
    CXXFLAGS="$PWD/csrc/wheels/manylinux_2_28.cpp -s ${CXXFLAGS:-}" build_wheel "linux_$1" "$work/$1"
    auditwheel repair --only-plat --exclude 'libtorch*.so' -w "$work/$1/audited" "$work/$1"/*.whl
    local oldest
    oldest=$(basename "$work/$1"/audited/*.whl | sed 's/.*-manylinux_2_\([0-9]*\)_.*/\1/')
    if [ "$oldest" -gt 28 ]; then
        echo "wheels: the library needs glibc 2.$oldest or a libstdc++ of its time; csrc/wheels/manylinux_2_28.cpp may help" >&2
        exit 1
    fi
    wheel tags --remove --platform-tag "manylinux_2_28_$1" "$work/$1"/audited/*.whl
    mv "$work/$1"/audited/*.whl dist
}

python -m build --sdist --outdir dist
case "$(uname -s)" in
Linux)
    manylinux "$(uname -m)"
    if [ "$(uname -m)" != aarch64 ]; then
        if command -v aarch64-linux-gnu-g++ >/dev/null; then
            CXX=aarch64-linux-gnu-g++ manylinux aarch64
        else
            echo "wheels: none for aarch64, because there is no aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"
        fi
    fi
    ;;
Darwin)
    export MACOSX_DEPLOYMENT_TARGET=11.0
    build_wheel "macosx_11_0_$(uname -m)" dist
    ;;
esac
twine check --strict dist/*
