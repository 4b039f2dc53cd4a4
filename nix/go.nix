# nixpkgs' buildGoModule, with the oldest Go there that go.mod accepts. pkgs in, the function out.
pkgs:
let
  inherit (pkgs) lib;
  required = (import ./version.nix).go;
  # Of Go's minor versions from go.mod's on, those that this nixpkgs has and still lets be used.
  minor = lib.toInt (builtins.elemAt (lib.splitVersion required) 1);
  offered = lib.filter (go: go.build != null && go.version.success) (
    map (minor: {
      version = builtins.tryEval (pkgs."go_1_${toString minor}".version or (throw "none"));
      build = pkgs."buildGo1${toString minor}Module" or null;
    }) (builtins.genList (i: minor + i) 20)
  );
  newEnough = lib.filter (go: lib.versionAtLeast go.version.value required) offered;
in
if newEnough != [ ] then
  (lib.head newEnough).build
else
  throw ''
    anthropic-oauth-proxy: go.mod asks for Go ${required}, and this nixpkgs has ${
      if offered == [ ] then
        "none of 1.${toString minor} or later"
      else
        lib.concatMapStringsSep ", " (go: go.version.value) offered
    }. Either
      - use a nixpkgs that is new enough, such as the one that this flake pins, or nixos-26.05 of today: nix flake update nixpkgs;
      - or give the package a Go of your own:
        anthropic-oauth-proxy.override { buildGoModule = buildGoModule.override { go = …; }; }''
