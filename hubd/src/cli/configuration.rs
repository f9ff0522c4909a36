//! `config default`, `check`, and where `serve` takes its configuration from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::builder::ValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches};
use cortex_shared::telemetry::{check_filter, log_filter};

use super::{DataArg, output};
use crate::config::HubConfig;
use crate::config::settings::{self, SETTINGS};

/// A configuration from file, environment and flags.
#[derive(Args)]
pub(super) struct Configuration {
    /// File with settings; `cortex-hubd config default` prints one
    #[arg(long, value_name = "FILE", env = "CORTEX_HUB_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    data: DataArg,
    #[command(flatten)]
    settings: Settings,
}

impl Configuration {
    /// Reads the file anew each time.
    pub(super) fn read(&self) -> anyhow::Result<HubConfig> {
        let mut config = self.data.config();
        if let Some(file) = &self.config {
            settings::apply_file(&mut config, file)?;
        }
        settings::apply_texts(&mut config, &self.settings.said)?;
        if !self.settings.log_by_flag {
            config.log.filter = log_filter(&config.log.filter);
        }
        Ok(config)
    }
}

/// A flag and an environment variable for each setting; what was said by either, by the setting's name.
struct Settings {
    said: BTreeMap<&'static str, String>,
    /// Nothing goes before the flag, not even `CORTEX_LOG`.
    log_by_flag: bool,
}

impl Args for Settings {
    fn augment_args(command: Command) -> Command {
        let default = HubConfig::new(PathBuf::new());
        command.args(SETTINGS.iter().map(|setting| {
            let help = setting.help.lines().map(str::trim).collect::<Vec<_>>().join(" ");
            let value = setting.show(&default);
            let help = match value.as_str() {
                "" => help,
                value => format!("{help} [default: {value}]"),
            };
            let check = move |text: &str| {
                let mut scratch = HubConfig::new(PathBuf::new());
                setting.set(&mut scratch, text).map(|()| text.to_owned())
            };
            Arg::new(setting.name)
                .long(setting.flag())
                .env(setting.variable())
                .hide_env(true)
                .value_name(setting.kind)
                .value_parser(ValueParser::new(check))
                .help_heading("Settings")
                .help(help)
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let said = SETTINGS.iter().filter_map(|setting| {
            matches.get_one::<String>(setting.name).map(|text| (setting.name, text.clone()))
        });
        let log_by_flag = matches.value_source("log") == Some(ValueSource::CommandLine);
        Ok(Self { said: said.collect(), log_by_flag })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// `config default`.
pub(super) fn print_default() {
    output::print(settings::document(&HubConfig::new(PathBuf::new())).trim_end());
}

/// `check`: says what the configuration comes to.
pub(super) fn check(configuration: &Configuration) -> anyhow::Result<()> {
    let config = configuration.read()?;
    check_filter(&config.log.filter).map_err(|problem| anyhow::anyhow!("log: {problem}"))?;
    config.http.certificate_files().map_err(|problem| anyhow::anyhow!(problem))?;
    output::print(settings::document(&config).trim_end());
    Ok(())
}
