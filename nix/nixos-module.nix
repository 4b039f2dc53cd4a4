# services.anthropic-oauth-proxy: the proxy beside the machine's own tailscaled.
self:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.anthropic-oauth-proxy;

  # The program's own checks, at build time: a wrong key or value fails the build of the system.
  configFile =
    let
      unchecked = pkgs.writeText "config.toml" ((import ./toml.nix).render cfg.settings);
    in
    if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
      pkgs.runCommand "anthropic-oauth-proxy.toml" { } ''
        ${lib.getExe cfg.package} -config ${unchecked} -check-config >/dev/null
        cp ${unchecked} $out
      ''
    else
      unchecked;

  inherit (cfg.settings) proxy;
  port = lib.toInt (lib.last (lib.splitString ":" proxy.listen_addr));

  # What the unit's CPUQuota is, in percent: [ "50" ]; null if there is none.
  quota = builtins.match "([0-9]+)%" (
    toString (config.systemd.services.anthropic-oauth-proxy.serviceConfig.CPUQuota or "")
  );
in
{
  options.services.anthropic-oauth-proxy = {
    enable = lib.mkEnableOption "the Anthropic OAuth proxy, for the tailnet that this machine is on";

    package =
      let
        own = self.packages.${pkgs.stdenv.hostPlatform.system};
      in
      # An overlay's, where there is one.
      if pkgs ? anthropic-oauth-proxy then
        lib.mkPackageOption pkgs "anthropic-oauth-proxy" { }
      else
        lib.mkPackageOption own "default" { pkgsText = "this flake's packages"; };

    settings = lib.mkOption {
      default = { };
      example.proxy = {
        timeout_secs = 120;
        require_tailnet = true;
      };
      description = "config.toml as attributes; README.md has the keys. They are checked when the system is built.";
      type = lib.types.submodule {
        freeformType =
          let
            scalar = lib.types.oneOf [
              lib.types.str
              lib.types.int
              lib.types.bool
            ];
            table = lib.types.attrsOf scalar;
          in
          lib.types.attrsOf (lib.types.either table (lib.types.listOf table));
        # Named here because the unit and the firewall follow them; both are the program's defaults.
        options.proxy = lib.mkOption {
          default = { };
          description = "The table [proxy].";
          type = lib.types.submodule {
            freeformType = lib.types.attrsOf (
              lib.types.oneOf [
                lib.types.str
                lib.types.int
                lib.types.bool
              ]
            );
            options = {
              listen_addr = lib.mkOption {
                type = lib.types.strMatching ".*:[0-9]+";
                default = "0.0.0.0:8080";
                description = "The address to listen on.";
              };
              drain_timeout_secs = lib.mkOption {
                type = lib.types.ints.between 0 3600;
                default = 5;
                description = "How long requests in flight may take at a stop, in seconds.";
              };
            };
          };
        };
      };
    };

    logLevel = lib.mkOption {
      type = lib.types.enum [
        "error"
        "warn"
        "info"
        "debug"
        "trace"
      ];
      default = "info";
      description = "What is logged to the journal, as JSON lines.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      description = "Whether to let the tailnet reach the port; other interfaces stay closed.";
    };
  };

  config = lib.mkIf cfg.enable {
    networking.firewall.interfaces = lib.mkIf cfg.openFirewall {
      ${config.services.tailscale.interfaceName}.allowedTCPPorts = [ port ];
    };

    systemd.services.anthropic-oauth-proxy = {
      description = "Anthropic API proxy on the tailnet";
      wantedBy = [ "multi-user.target" ];
      wants = [
        "network-online.target"
        "tailscaled.service"
      ];
      after = [
        "network-online.target"
        "tailscaled.service"
      ];
      environment = {
        LOG_LEVEL = cfg.logLevel;
        # Whole CPUs of the quota, at least one; by itself Go takes no fewer than two.
        GOMAXPROCS = lib.mkIf (quota != null) (
          lib.mkDefault (toString (lib.max 1 ((lib.toInt (lib.head quota) + 99) / 100)))
        );
      };
      # Without a tailnet the proxy exits after 31 s and says why: try for as long as it takes.
      startLimitIntervalSec = 0;
      serviceConfig = {
        ExecStart = "${lib.getExe cfg.package} -config ${configFile}";
        Restart = "always";
        RestartSec = 5;
        TimeoutStopSec = proxy.drain_timeout_secs + 5;

        # Any user may read tailscaled's socket (mode 0666), and only root may write to it.
        DynamicUser = true;
        AmbientCapabilities = lib.optional (port < 1024) "CAP_NET_BIND_SERVICE";
        CapabilityBoundingSet = if port < 1024 then [ "CAP_NET_BIND_SERVICE" ] else "";
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        NoNewPrivileges = true;
        PrivateDevices = true;
        PrivateTmp = true;
        # A user namespace would take the capability for a low port away.
        PrivateUsers = port >= 1024;
        ProtectClock = true;
        ProtectControlGroups = true;
        ProtectHome = true;
        ProtectHostname = true;
        ProtectKernelLogs = true;
        ProtectKernelModules = true;
        ProtectKernelTunables = true;
        # Not ProcSubset = "pid" as well: process_start_time_seconds needs /proc/stat.
        ProtectProc = "invisible";
        ProtectSystem = "strict";
        RemoveIPC = true;
        RestrictAddressFamilies = [
          "AF_INET"
          "AF_INET6"
          "AF_UNIX"
        ];
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        SystemCallArchitectures = "native";
        SystemCallErrorNumber = "EPERM";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
        UMask = "0077";
      };
    };
  };
}
