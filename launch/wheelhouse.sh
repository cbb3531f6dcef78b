#!/usr/bin/env bash
# For machines without network: collects every wheel into a folder, where there is network, and installs from it.
#   bash launch/wheelhouse.sh --out DIR [--python 3.12] [--platform manylinux_2_28_x86_64] [--part-size 60M] [--no-deps] [REQUIREMENT ...]
#   bash launch/wheelhouse.sh --install DIR [--into ENVIRONMENT]
# REQUIREMENT: as pip takes it, "." is this checkout; default ".[cuda13]" (".[cuda12]" for drivers before 580). About 4 GB.
# --part-size: one archive in parts instead of single wheels, for media and transfers with a limit.
# --install: into ENVIRONMENT, made if it is not there (default: the active one, or .venv of the checkout). DIR/install.sh does the same.
set -euo pipefail

usage() {
    echo "error: $*" >&2
    echo "usage: wheelhouse.sh --out DIR [--python 3.12] [--platform TAG] [--part-size 60M] [--no-deps] [REQUIREMENT ...]" >&2
    echo "       wheelhouse.sh --install DIR [--into ENVIRONMENT]" >&2
    exit 2
}

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# The copy in a wheelhouse has no checkout around it.
root="$(cd -- "$here/.." && pwd)"
[[ -f $root/pyproject.toml && -f $root/launch/environment.sh ]] || root=""
out="" version="" platform="manylinux_2_28_$(uname -m)" size="" from="" into="" depend=() requirements=()
while (($#)); do
    case "$1" in
    --out | --python | --platform | --part-size | --install | --into)
        (($# > 1)) || usage "$1 needs a value"
        case "$1" in
        --out) out="$2" ;; --python) version="$2" ;; --platform) platform="$2" ;;
        --part-size) size="$2" ;; --install) from="$2" ;; --into) into="$2" ;;
        esac
        shift
        ;;
    --no-deps) depend=(--no-deps) ;;
    -*) usage "unknown option $1" ;;
    *) requirements+=("$1") ;;
    esac
    shift
done
work="" # on the disk that the result is on: there are gigabytes
trap '[[ -z $work ]] || rm -rf -- "$work"' EXIT

any_python() {
    local name
    for name in "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${root:+$root/.venv/bin/python}" ${version:+"python$version"} python3 python; do
        if [[ -n $name ]] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    usage "Python 3.11 or newer is needed and none was found on the PATH"
}

# Names that the wheels in a folder need, under the target's Python, and that are not there. pip download asks the Python it runs in.
missing() {
    "$python" - "$1" "$version" "${platform##*manylinux_2_[0-9][0-9]_}" <<'PY'
import email, pathlib, sys, zipfile
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
folder, version, machine = sys.argv[1:]
target = {"python_version": version, "python_full_version": version + ".0", "platform_machine": machine,
          "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "extra": ""}
wheels = list(pathlib.Path(folder).glob("*.whl"))
have = {parse_wheel_filename(wheel.name)[0] for wheel in wheels}
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        needs = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    for need in map(Requirement, needs):
        if (need.marker is None or need.marker.evaluate(target)) and canonicalize_name(need.name) not in have:
            print(f"{need.name}{need.specifier}")
PY
}

collect() {
    local python build=(build) tags=() glibc constraints=() required=() listed=() name project wheels more=()
    [[ -n $root ]] || usage "wheels are collected from a checkout; this is a copy for --install"
    [[ ! -e $out || -z "$(ls -A -- "$out")" ]] || usage "$out is not empty"
    [[ -z $size || $size =~ ^[1-9][0-9]*[KMG]?$ ]] || usage "--part-size $size: a number with K, M or G"
    [[ -z $version || $version =~ ^3\.[0-9]+$ ]] || usage "--python $version: such as 3.12"
    python="$(any_python)" || exit
    version="${version:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
    if [[ $platform =~ ^manylinux_2_([0-9]+)_(.+)$ ]]; then # pip takes this tag alone, but a newer glibc runs what an older one does
        for ((glibc = BASH_REMATCH[1]; glibc >= 5; glibc--)); do tags+=(--platform "manylinux_2_${glibc}_${BASH_REMATCH[2]}"); done
        for name in manylinux2014 manylinux2010 manylinux1 linux; do tags+=(--platform "${name}_${BASH_REMATCH[2]}"); done
    else
        tags=(--platform "$platform")
    fi
    ((${#requirements[@]})) || requirements=(".[cuda13]")
    [[ " ${requirements[*]} " == *cuda12* ]] || constraints=(-c "$root/constraints.txt") # the exact versions that the tests passed with
    out="$(realpath -m -- "$out")"
    work="$out/.collecting"
    wheels="$work/wheels"
    mkdir -p -- "$wheels" || usage "--out $out cannot be made: choose another folder"

    echo "collecting for Python $version, $platform: ${requirements[*]}"
    export DS_BUILD_OPS=0 # DeepSpeed compiles its operators where they are first used
    for name in "${requirements[@]}"; do
        if [[ $name == . || $name == .\[* ]]; then
            # From a copy, so that no build folder appears in the checkout.
            mkdir -p "$work/source"
            (cd "$root" && cp -r pyproject.toml README.md ddpm_dist configs "$work/source/")
            "$python" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" "$work/source"
            project="$(basename -- "$wheels"/ddpm_dist-*.whl)"
            required+=("$wheels/$project${name#.}") # the file: an index may have something under the same name
            project="${project#ddpm_dist-}"
            listed+=("ddpm_dist${name#.}==${project%%-*}")
            ((${#depend[@]})) || build+=(deepspeed)
        else
            required+=("$name") listed+=("$name")
        fi
    done
    # What is published as source only is built here, and must come out the same for every Python.
    for name in "${build[@]:1}"; do
        "$python" -m pip wheel --quiet --no-deps "${constraints[@]}" --wheel-dir "$wheels" "$name"
        compgen -G "$wheels/$name-*-none-any.whl" >/dev/null || usage "$name was built for this machine only, it has to be built on the target"
    done
    fetch() {
        "$python" -m pip download --quiet --only-binary=:all: --implementation cp --python-version "$version" "${tags[@]}" \
            --find-links "$wheels" --dest "$wheels" "$@"
    }
    if ! fetch "${depend[@]}" "${constraints[@]}" "${required[@]}"; then
        ((${#constraints[@]})) || exit 1
        echo "the tested versions are not to be had for this target, taking the newest ones instead" >&2
        constraints=()
        fetch "${depend[@]}" "${required[@]}"
    fi
    while ((!${#depend[@]})) && mapfile -t more < <(missing "$wheels") && ((${#more[@]})); do
        echo "and for Python $version: ${more[*]}"
        fetch "${constraints[@]}" "${more[@]}"
    done

    printf '%s\n' "${listed[@]}" >"$wheels/requirements.txt"
    printf '%s\n' "python=$version" "platform=$platform" "no_deps=${#depend[@]}" >"$wheels/wheelhouse.txt"
    (cd "$wheels" && sha256sum -- *.whl requirements.txt wheelhouse.txt >SHA256SUMS)
    if [[ -n $size ]]; then
        tar -C "$wheels" -cf - . | split -b "$size" -d -a 4 - "$out/wheelhouse.tar."
        (cd "$out" && sha256sum -- wheelhouse.tar.* >SHA256SUMS)
    else
        mv -- "$wheels"/* "$out/"
    fi
    cp -- "${BASH_SOURCE[0]}" "$out/install.sh"
    rm -rf -- "$work"
    echo "$(wc -l <"$out/SHA256SUMS") files, $(du -sh -- "$out" | cut -f1), in $out. There: bash $out/install.sh"
}

install() {
    local wheels="$from" wanted have depend=() sum dali
    into="${into:-${VIRTUAL_ENV:-${CONDA_PREFIX:-${root:-$PWD}/.venv}}}"
    mkdir -p -- "$(dirname -- "$into")"
    [[ -f $from/SHA256SUMS ]] || usage "$from is no wheelhouse: SHA256SUMS is missing"
    verify() {
        (cd -- "$1" && sha256sum --check --quiet --strict SHA256SUMS) || {
            echo "error: $1 is damaged or incomplete (see above): copy these files again" >&2
            exit 2
        }
    }
    verify "$from"
    if [[ -f $from/wheelhouse.tar.0000 ]]; then
        work="$(mktemp -d -p "$(dirname -- "$into")")"
        wheels="$work"
        cat -- "$from"/wheelhouse.tar.[0-9]* | tar -C "$wheels" -xf -
        verify "$wheels"
    fi
    version="$(sed -n 's/^python=//p' "$wheels/wheelhouse.txt")"
    if [[ ! -x $into/bin/python ]]; then
        wanted="python$version"
        command -v "$wanted" >/dev/null || wanted=python3
        check_version "$wanted"
        "$wanted" -m venv "$into"
    fi
    check_version "$into/bin/python"
    [[ "$(sed -n 's/^no_deps=//p' "$wheels/wheelhouse.txt")" == 0 ]] || depend=(--no-deps)
    # --isolated: no index and no folder of this machine's configuration can come in between.
    "$into/bin/python" -m pip --isolated install --quiet --disable-pip-version-check --no-index --find-links "$wheels" "${depend[@]}" \
        -r "$wheels/requirements.txt"
    # The other scripts of a checkout then know that nothing is missing.
    if [[ -n $root ]] && dali="$(grep -o 'cuda1[23]' "$wheels/requirements.txt")"; then
        sum="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
        echo "$dali base $sum" >>"$into/.ddpm_dist_installed"
    fi
    echo "installed into $into: $(paste -sd ' ' "$wheels/requirements.txt")"
}

check_version() {
    have="$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo none)"
    [[ $have == "$version" ]] || usage "$from is for Python $version, $1 is $have: take another --into, or collect with --python $have"
}

[[ -n $out$from || ${BASH_SOURCE[0]##*/} != install.sh ]] || from="$here" # the copy in a wheelhouse
[[ -z $out || -z $from ]] || usage "--out or --install, not both"
if [[ -n $from ]]; then
    ((!${#requirements[@]})) || usage "--install takes no requirements"
    install
elif [[ -n $out ]]; then
    collect
else
    usage "--out DIR or --install DIR"
fi
