#!/usr/bin/env bash
# Install AI4Land on a cluster without internet, in two steps.
#
#     install-offline.sh pack FOLDER [OPTIONS]     on Linux with internet, in a clone of the project: put everything needed into FOLDER
#         --python 3.11        Python version of the cluster, needed here too, because dependencies depend on it
#         --glibc 2.34         at most the C library of the cluster: `ldd --version` there (RHEL 8: 2.28, RHEL 9: 2.34)
#         --torch-index URL    index of PyTorch wheels for your CUDA version or for CPUs (see PyTorch's "get started" page);
#                              default: pip's index, whose wheels are built for the newest CUDA version
#         --extras hpc         extras of the project
#         --no-deps            only the project, for an environment that has the rest
#
#     FOLDER/install-offline.sh install PREFIX     on the cluster: make PREFIX/venv from it, and put the job files into PREFIX/mn5
#         --python python3.11  the interpreter
#
# In between, copy FOLDER, for example with `rsync -a --partial FOLDER me@transfer1.bsc.es:/gpfs/projects/GROUP/`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
fail() { echo "install-offline.sh: $*" >&2; exit 1; }

pack() {
    local folder=$1 python=3.11 glibc=2.34 index="" extras=hpc deps=yes project wheel sums n where=()
    shift
    while (($#)); do
        case $1 in
            --no-deps) deps=no; shift; continue ;;
            --python | --glibc | --torch-index | --extras) (($# > 1)) || usage ;;
            *) usage ;;
        esac
        case $1 in --python) python=$2 ;; --glibc) glibc=$2 ;; --torch-index) index=$2 ;; --extras) extras=$2 ;; esac
        shift 2
    done
    [[ $python =~ ^3\.[0-9]+$ ]] || fail "--python is $python, expected a version such as 3.11"
    [[ $glibc =~ ^2\.[0-9]+$ ]] || fail "--glibc is $glibc, expected a version such as 2.34"
    [[ $(uname -s) == Linux ]] || fail "the system is $(uname -s), expected Linux, as on the cluster; pack in a Linux container, for example"
    command -v "python$python" >/dev/null || fail "python$python is not on the path, but --python asks for it; install it, or pack in a container that has it"
    project=$(cd "$here/../.." && pwd)
    [[ -f $project/pyproject.toml ]] || fail "no pyproject.toml in $project; pack from a clone of the project"
    [[ ! -e $folder || -z $(ls -A "$folder") ]] || fail "$folder is not empty; give a new folder"
    mkdir -p "$folder/wheels" "$folder/mn5"
    folder=$(cd "$folder" && pwd)

    "python$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder/wheels" "$project"
    wheel=$(echo "$folder"/wheels/ai4land-*.whl)
    if [[ $deps == yes ]]; then
        where=(--only-binary=:all: --implementation cp --python-version "$python" --abi "cp${python/./}" --abi abi3 --abi none)
        for ((n = 5; n <= ${glibc#2.}; n++)); do where+=(--platform "manylinux_2_${n}_x86_64"); done
        where+=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)
        # PyTorch first: the second download finds it in the folder and fetches no other.
        [[ -z $index ]] || "python$python" -m pip download --quiet "${where[@]}" --dest "$folder/wheels" --constraint "$project/constraints.txt" \
            --no-deps --index-url "$index" torch
        "python$python" -m pip download --quiet "${where[@]}" --dest "$folder/wheels" --constraint "$project/constraints.txt" \
            ${index:+--extra-index-url "$index"} --find-links "$folder/wheels" "${wheel}[$extras]"
    fi
    cp "$here"/*.yaml "$here"/*.sbatch "$here"/*.def "$here"/env.sh "$here"/tunnel.sh "$folder/mn5/"
    cp "${BASH_SOURCE[0]}" "$folder/"
    echo "$python $deps $(basename "$wheel")[$extras]" >"$folder/PACKED"
    sums=$(cd "$folder" && find . -type f -print0 | sort -z | xargs -0 sha256sum)
    echo "$sums" >"$folder/SHA256SUMS"
    echo "packed $(find "$folder/wheels" -name '*.whl' | wc -l) wheels, $(du -sh "$folder" | cut -f 1), for Python $python into $folder"
}

install() {
    local prefix=$1 wanted deps wheel python pip
    shift
    [[ -f $here/PACKED && -f $here/SHA256SUMS ]] || fail "$here has no file PACKED; run the copy of this script in the packed folder"
    read -r wanted deps wheel <"$here/PACKED"
    python=python$wanted
    case $# in 0) ;; 2) [[ $1 == --python ]] || usage; python=$2 ;; *) usage ;; esac
    (cd "$here" && sha256sum --check --quiet SHA256SUMS) || fail "$here differs from what was packed; copy it again"
    command -v "$python" >/dev/null || fail "$python is not on the path; load its module (module avail python), or give --python"
    [[ $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') == "$wanted" ]] ||
        fail "$python is $("$python" --version), expected Python $wanted, as for the wheels; load its module, or pack with --python"

    mkdir -p "$prefix"
    [[ -x $prefix/venv/bin/python ]] || "$python" -m venv "$prefix/venv"
    # Use only the wheels of this folder: no index, and no source from pip's configuration.
    pip=(env PIP_CONFIG_FILE=/dev/null "$prefix/venv/bin/python" -m pip --isolated install --quiet --disable-pip-version-check)
    pip+=(--no-index --find-links "$here/wheels")
    [[ $deps == yes ]] || pip+=(--no-deps)
    "${pip[@]}" --upgrade "$here/wheels/$wheel"
    if [[ -d $prefix/mn5 ]]; then echo "kept $prefix/mn5 unchanged; new files are in $here/mn5"; else cp -r "$here/mn5" "$prefix/mn5"; fi
    [[ $deps == no ]] || "$prefix/venv/bin/python" -c 'import ai4land, torch; print(f"ai4land {ai4land.__version__}, torch {torch.__version__}")'
    echo "installed into $prefix/venv; next: source $prefix/mn5/env.sh"
}

(($# >= 2)) || usage
case $1 in pack | install) "$@" ;; *) usage ;; esac
