# What other files state, read from there, so that it stands in one place only.
let
  # The first line of a file that the pattern matches whole: its last group.
  grep =
    pattern: file:
    let
      lines = builtins.filter builtins.isString (builtins.split "\n" (builtins.readFile file));
      found = builtins.filter (m: m != null) (map (builtins.match pattern) lines);
    in
    if found == [ ] then
      throw "${toString file} has no line like ${pattern}"
    else
      last (builtins.head found);
  last = list: builtins.elemAt list (builtins.length list - 1);
in
{
  # This program's version.
  proxy = grep ''const version = "([^"]+)"'' ../main.go;

  # The oldest Go that builds it.
  go = grep "go ([0-9.]+)" ../go.mod;

  # The tailscale.com module's version, and so the sidecar's: client and daemon of one release.
  tailscale = grep "(require|[[:space:]]*)[[:space:]]tailscale[.]com (v[0-9.]+)" ../go.mod;
}
