#!/usr/bin/env bash
# Makes the project's virtual environment; does nothing when it is already there and current.
set -euo pipefail
unset PYTHONHOME PYTHONPATH # either one would let packages from outside leak into the environment
unset CDPATH # cd would go to other directories, and print them

readonly OLDEST=3.11 # jax 0.10.2 is the last jax that runs on it
readonly NEWEST=3.13 # newest that the test suite ran on; --python goes beyond it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT

usage() {
  cat <<HELP
usage: ./setup.sh [--dev] [--accelerator auto|cpu|cuda12|tpu] [--python PATH] [--venv DIR]

Makes a virtual environment in DIR (default: .venv beside this script) and installs what
sheepop_jax needs. Run it as often as you like: when nothing changed it does nothing, when a
requirements file changed it installs the difference, when it was interrupted it starts again.
An option that you leave out keeps what the environment already has.

  --dev                 add tests, linter, type checker and notebooks (requirements/dev.txt)
  --accelerator NAME    auto (default) takes cuda12 if nvidia-smi finds a GPU, tpu on a TPU VM,
                        else cpu. cpu never downloads CUDA, which takes several gigabytes.
                          cuda12  requirements.txt
                          tpu     requirements/tpu.txt
                          cpu     requirements/cpu.txt
  --python PATH         the interpreter to use, $OLDEST or newer; so does the variable PYTHON.
                        Default: the newest of $OLDEST to $NEWEST that starts, looked for on PATH, in
                        pyenv's versions and in uv's. A name on PATH that fails is passed over.
  --venv DIR            where to make it
  --print-python WHICH  print the newest|oldest interpreter that would do, and stop
  --print-accelerator   print the accelerator that auto finds, and stop
  -h, --help            this text

Examples:
  ./setup.sh                                 # what 'make train' runs
  ./setup.sh --dev                           # what 'make test' runs
  ./setup.sh --accelerator cpu               # CPU packages on a machine with a GPU
  ./setup.sh --python python3.12 --venv /tmp/py312

Then: .venv/bin/python train.py --config configs/quickstart.py
Exit status: 0 ready, 1 could not be made, 2 bad option. The full log is DIR/setup.log.
HELP
}

say() { printf 'setup: %s\n' "$1" >&2; }

die() {
  printf 'error: %s\n' "$1" >&2
  exit "${2:-1}"
}

# --- The interpreter ---------------------------------------------------------------------------

# Prints "MAJOR MINOR MICRO venv|bare REAL_PATH" for an interpreter that starts and is usable:
# CPython, 64 bits, a release, with the GIL (the libraries ship wheels for nothing else), with ssl
# (pip needs it). Inside a virtual environment REAL_PATH is the interpreter that it was made from.
probe() {
  "$1" -I -c '
import os, ssl, sys, sysconfig
v = sys.version_info
if (sys.implementation.name != "cpython" or sys.maxsize < 2**32 or v.releaselevel != "final"
        or sysconfig.get_config_var("Py_GIL_DISABLED")):
    sys.exit(1)
try:
    import ensurepip, venv
    kind = "venv"
except ImportError:  # Debian and Ubuntu put ensurepip into a package of its own
    kind = "bare"
base = getattr(sys, "_base_executable", "")
print(*v[:3], kind, base if base and os.access(base, os.X_OK) else sys.executable)
' </dev/null 2>/dev/null
}

# Prints every place where an interpreter may be, one a line. A pyenv shim can be on PATH and not
# start, and can hide a system interpreter of the same name: hence all of PATH, and probe.
candidates() {
  local minor name path
  for minor in 14 13 12 11 ""; do
    name=python3${minor:+.$minor}
    type -aP "$name" || true
  done
  for path in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python3 \
    "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"/*/bin/python3; do
    [ -x "$path" ] && printf '%s\n' "$path"
  done
  return 0
}

version_key() { # MAJOR MINOR [MICRO] → a number that orders versions
  printf '%d' $(($1 * 1000000 + $2 * 1000 + ${3:-0}))
}

# Prints the probe's line of the newest|oldest usable candidate; one that can make environments by
# itself goes before one that cannot.
choose_python() {
  local which=$1 low high path line key best="" best_key=0 bare="" bare_key=0
  local major minor micro kind real
  low=$(version_key "${OLDEST%.*}" "${OLDEST#*.}")
  high=$(version_key "${NEWEST%.*}" "${NEWEST#*.}" 999)
  while IFS= read -r path; do
    line=$(probe "$path") || continue
    read -r major minor micro kind real <<<"$line"
    key=$(version_key "$major" "$minor" "$micro")
    [ "$key" -ge "$low" ] && [ "$key" -le "$high" ] || continue
    [ "$which" = newest ] || key=$((2 * high - key)) # so that the greatest key is the oldest
    if [ "$kind" = venv ] && [ "$key" -gt "$best_key" ]; then
      best=$line best_key=$key
    elif [ "$kind" = bare ] && [ "$key" -gt "$bare_key" ]; then
      bare=$line bare_key=$key
    fi
  done < <(candidates)
  best=${best:-$bare}
  [ -n "$best" ] || die "no Python $OLDEST to $NEWEST that starts was found on PATH, in pyenv or in\
 uv; try 'sudo apt install python3 python3-venv', or --python PATH"
  printf '%s\n' "$best"
}

# Prints the probe's line of an interpreter that the user named.
named_python() {
  local line major minor rest
  line=$(probe "$1") || die "--python or PYTHON: got '$1'; expected a 64-bit CPython with ssl that starts" 2
  read -r major minor rest <<<"$line"
  [ "$(version_key "$major" "$minor")" -ge "$(version_key "${OLDEST%.*}" "${OLDEST#*.}")" ] ||
    die "--python or PYTHON: got '$1', which is Python $major.$minor; expected $OLDEST or newer" 2
  printf '%s\n' "$line"
}

# --- The accelerator ---------------------------------------------------------------------------

# The rule by which jax itself finds TPU chips (jax/_src/hardware_utils.py): Google's PCI vendor
# number and one of the chips' device numbers; the vendor alone is also Google's network card.
has_tpu() {
  local device vendor_file
  for vendor_file in "${SETUP_SYSFS:-/sys}"/bus/pci/devices/*/vendor; do # the variable: for tests
    [ -r "$vendor_file" ] && [ "$(cat "$vendor_file")" = 0x1ae0 ] || continue
    device=$(cat "${vendor_file%/vendor}/device")
    case $device in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076 | 0x0083 | 0x007c) return 0 ;;
    esac
  done
  return 1
}

detect_accelerator() {
  local gpus=""
  gpus=$(nvidia-smi -L 2>/dev/null) || gpus="" # installed without a working driver: it fails
  case $gpus in
    *"GPU "*) echo cuda12 ;;
    *) if has_tpu; then echo tpu; else echo cpu; fi ;;
  esac
}

requirement_files() { # ACCELERATOR DEV → the files to install from
  case $1 in
    cuda12) echo requirements.txt ;;
    *) echo "requirements/$1.txt" ;;
  esac
  [ "$2" = no ] || echo requirements/dev.txt
}

# Prints every requirement line of FILES and of the files they include, without comments, so that
# a better comment does not install anything.
# shellcheck disable=SC2094  # it sees a file read and named in one loop; nothing is written
requirement_lines() {
  local file line
  for file in "$@"; do
    while IFS= read -r line || [ -n "$line" ]; do
      line=${line%%#*}
      read -r line <<<"$line" || true
      case $line in
        "") ;;
        "-r "*) requirement_lines "$(dirname "$file")/${line#-r }" ;;
        *) printf '%s\n' "$line" ;;
      esac
    done <"$file"
  done
}

# --- The environment ---------------------------------------------------------------------------

stamp_field() { # NAME → its value in the stamp, empty without one
  [ -f "$stamp" ] || return 0
  sed -n "s/^$1: //p" "$stamp"
}

# Empties DIR, if it is ours to empty, and makes the bare environment in it.
make_environment() { # PROBE_LINE
  local major minor micro kind real
  read -r major minor micro kind real <<<"$1"
  if [ -d "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    [ -f "$stamp" ] || [ -f "$pending" ] || die "--venv: got '$venv', which exists and was not made\
 by setup.sh; expected a new or an empty directory; try removing it, or --venv DIR" 2
    rm -rf -- "$venv"
  fi
  mkdir -p "$venv"
  : >"$pending"
  say "making $shown with Python $major.$minor.$micro ($real)"
  if [ "$kind" = venv ]; then
    "$real" -m venv "$venv" >"$log" 2>&1 || die "$real -m venv failed: $(tail -n 1 "$log")"
  elif "$real" -m virtualenv --version >/dev/null 2>&1; then
    "$real" -m virtualenv "$venv" >"$log" 2>&1 || die "virtualenv failed: $(tail -n 1 "$log")"
  elif command -v virtualenv >/dev/null; then
    virtualenv -p "$real" "$venv" >"$log" 2>&1 || die "virtualenv failed: $(tail -n 1 "$log")"
  else
    die "Python $major.$minor ($real) cannot make virtual environments: ensurepip is missing;\
 try 'sudo apt install python$major.$minor-venv'"
  fi
}

follow_pip() { # pip's talk: all of it into the log, one line for each download to the user
  local line name version
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$log"
    read -r line <<<"$line" || true
    case $line in
      *.metadata*) ;;
      "Downloading "*-*-*" ("*)
        name=${line#Downloading } name=${name%% (*} name=${name##*/}
        version=${name#*-} version=${version%%-*}
        say "downloading ${name%%-*} $version (${line##*(}"
        ;;
      "Installing collected packages: "*) say "installing the packages" ;;
    esac
  done
}

install_packages() { # FILE…
  local file attempt arguments=()
  for file in "$@"; do arguments+=(-r "$file"); done
  # PIP_USER=0: a pip configured to install into the home directory would refuse to work in here.
  export PIP_USER=0 PIP_RETRIES=${PIP_RETRIES:-5} PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-60}
  for attempt in 1 2 3; do # pip's own retries do not cover a download that breaks off
    if "$venv/bin/python" -m pip install --no-input --disable-pip-version-check \
      --progress-bar off "${arguments[@]}" 2>&1 | follow_pip; then
      "$venv/bin/python" -c "import jax" >>"$log" 2>&1 ||
        die "jax was installed but does not import: $(tail -n 1 "$log"); full log: $log"
      return 0
    fi
    if [ "$attempt" -lt 3 ]; then
      say "pip failed, trying again"
      sleep "$attempt"
    fi
  done
  die "pip install failed: $(grep -i '^error' "$log" | tail -n 1); full log: $log"
}

main() {
  local accelerator="" python=${PYTHON:-} dev=no how print="" line reason=""
  local major minor micro kind real wanted files=()
  venv=$ROOT/.venv
  while [ $# -gt 0 ]; do
    case $1 in
      --dev) dev=yes ;;
      --accelerator | --python | --venv | --print-python)
        [ $# -ge 2 ] && [ -n "$2" ] || die "$1: got nothing; expected a value; try --help" 2
        case $1 in
          --accelerator) accelerator=$2 ;;
          --python) python=$2 ;;
          --venv) venv=$2 ;;
          --print-python) print=$2 ;;
        esac
        shift
        ;;
      --print-accelerator) print=accelerator ;;
      -h | --help) usage && exit 0 ;;
      *) die "setup.sh: got '$1'; expected one of the options of ./setup.sh --help" 2 ;;
    esac
    shift
  done
  case $accelerator in
    "" | auto | cpu | cuda12 | tpu) ;;
    *) die "--accelerator: got '$accelerator'; expected auto, cpu, cuda12 or tpu" 2 ;;
  esac
  case $print in
    "") ;;
    accelerator) detect_accelerator && exit 0 ;;
    newest | oldest)
      line=$(choose_python "$print")
      printf '%s\n' "${line#* * * * }"
      exit 0
      ;;
    *) die "--print-python: got '$print'; expected newest or oldest" 2 ;;
  esac

  mkdir -p "$(dirname "$venv")"
  venv=$(cd "$(dirname "$venv")" && pwd)/$(basename "$venv")
  shown=${venv#"$ROOT"/}
  stamp=$venv/.setup-done       # written last, by a rename: without it nothing is taken for whole
  pending=$venv/.setup-pending  # written first: what has it was begun by this script
  log=$venv/setup.log
  if command -v flock >/dev/null; then # two at once wait; pip inherits the lock and keeps it
    exec 9<"$(dirname "$venv")"
    flock -n 9 || { say "waiting for another setup.sh" && flock 9; }
  fi

  if [ -z "$accelerator" ] && [ "$(stamp_field chosen)" = "by the user" ]; then
    accelerator=$(stamp_field accelerator)
  fi
  how="by the user"
  case $accelerator in
    "" | auto) accelerator=$(detect_accelerator) how=automatically ;;
  esac
  [ "$(stamp_field development)" != yes ] || dev=yes
  if [ -n "$python" ]; then
    line=$(named_python "$python")
  elif line=$(stamp_field python) && [ -n "$line" ] && "$venv/bin/python" -c "" 2>/dev/null; then
    : # keep it: a newer interpreter on the machine is no reason to install everything again
  else
    line=$(choose_python newest)
  fi
  read -r major minor micro kind real <<<"$line"

  cd "$ROOT"
  while IFS= read -r file; do files+=("$file"); done < <(requirement_files "$accelerator" "$dev")
  wanted="directory: $venv
python: $line
accelerator: $accelerator
chosen: $how
development: $dev
$(requirement_lines "${files[@]}")"
  if [ -f "$stamp" ] && "$venv/bin/python" -c "" 2>/dev/null; then
    [ "$wanted" != "$(cat "$stamp")" ] || reason=current
    if [ "$reason" != current ] && [ "$(stamp_field directory)" = "$venv" ] &&
      [ "$(stamp_field python)" = "$line" ] && [ "$(stamp_field accelerator)" = "$accelerator" ]; then
      reason=requirements
    fi
  fi
  case $reason in
    current)
      say "$shown is ready (Python $major.$minor.$micro, $accelerator, development: $dev)"
      exit 0
      ;;
    requirements)
      say "updating $shown"
      mv "$stamp" "$pending"
      ;;
    *) make_environment "$line" ;;
  esac
  say "installing ${files[*]}"
  install_packages "${files[@]}"
  printf '%s\n' "$wanted" >"$pending"
  mv "$pending" "$stamp"
  say "$shown is ready (Python $major.$minor.$micro, $accelerator, development: $dev)"
}

main "$@"
