//! The `CNI_*` environment variables, checked before anything is done.

use crate::error::{CniError, code};

/// What the runtime wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// Attach the container.
    Add,
    /// Detach it.
    Del,
    /// Tell the supported versions.
    Version,
}

/// The variables, checked.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Environment {
    /// `CNI_CONTAINERID`.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
    /// `CNI_NETNS`; empty for a DEL after the namespace is gone.
    pub netns: String,
    /// `K8S_POD_NAMESPACE` of `CNI_ARGS`, or empty.
    pub pod_namespace: String,
    /// `K8S_POD_NAME` of `CNI_ARGS`, or empty.
    pub pod_name: String,
    /// `K8S_POD_UID` of `CNI_ARGS`, or empty.
    pub pod_uid: String,
}

/// Reads `CNI_COMMAND`. `variable` looks a variable up; unset and empty are the same.
///
/// # Errors
///
/// Code 4 if it is missing, unknown, or not supported.
pub fn command(variable: impl Fn(&str) -> Option<String>) -> Result<Command, CniError> {
    match value(&variable, "CNI_COMMAND").as_str() {
        "ADD" => Ok(Command::Add),
        "DEL" => Ok(Command::Del),
        "VERSION" => Ok(Command::Version),
        "" => Err(invalid(
            "CNI_COMMAND is not set; a container runtime sets it to ADD, DEL or VERSION",
        )),
        known @ ("CHECK" | "GC" | "STATUS") => Err(invalid(format!(
            "CNI_COMMAND {known} is not supported by this version of weir-cni; it supports ADD, DEL \
             and VERSION"
        ))),
        unknown => Err(invalid(format!(
            "CNI_COMMAND {unknown:?} is unknown; it is ADD, DEL or VERSION"
        ))),
    }
}

impl Environment {
    /// Reads the variables of ADD and DEL.
    ///
    /// # Errors
    ///
    /// Code 4, naming the variable.
    pub fn read(
        command: Command,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, CniError> {
        let container_id = required(&variable, "CNI_CONTAINERID", "the container's identifier")?;
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if !container_id.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !container_id.chars().all(allowed)
        {
            return Err(invalid(format!(
                "CNI_CONTAINERID {container_id:?} is not a letter or digit followed by letters, \
                 digits, _ . or -"
            )));
        }
        let ifname = required(
            &variable,
            "CNI_IFNAME",
            "the interface's name in the container",
        )?;
        if ifname.len() > 15 {
            return Err(invalid(format!(
                "CNI_IFNAME {ifname:?} has {} bytes; an interface name has 1 to 15",
                ifname.len()
            )));
        }
        if matches!(ifname.as_str(), "." | "..")
            || ifname.contains(|c: char| matches!(c, '/' | ':') || c.is_whitespace())
        {
            return Err(invalid(format!(
                "CNI_IFNAME {ifname:?} is no interface name: not . or .., without / : and white space"
            )));
        }
        let netns = value(&variable, "CNI_NETNS");
        if netns.is_empty() && command == Command::Add {
            return Err(invalid(
                "CNI_NETNS is not set; ADD needs the path of the container's network namespace",
            ));
        }
        let mut environment = Self {
            container_id,
            ifname,
            netns,
            ..Self::default()
        };
        environment.read_arguments(&value(&variable, "CNI_ARGS"))?;
        Ok(environment)
    }

    /// `CNI_ARGS`: `KEY=VALUE;KEY=VALUE`. Unknown keys are others' business, whether or not
    /// `IgnoreUnknown` is set.
    fn read_arguments(&mut self, arguments: &str) -> Result<(), CniError> {
        for pair in arguments.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(invalid(format!(
                    "CNI_ARGS has {pair:?}, which is no KEY=VALUE; pairs are separated by ;"
                )));
            };
            match key {
                "K8S_POD_NAMESPACE" => self.pod_namespace = value.to_owned(),
                "K8S_POD_NAME" => self.pod_name = value.to_owned(),
                "K8S_POD_UID" => self.pod_uid = value.to_owned(),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A variable that ADD and DEL need; `what` it is to hold.
fn required(
    variable: impl Fn(&str) -> Option<String>,
    name: &str,
    what: &str,
) -> Result<String, CniError> {
    let value = value(variable, name);
    if value.is_empty() {
        return Err(invalid(format!(
            "{name} is not set; a container runtime sets it to {what}"
        )));
    }
    Ok(value)
}

fn value(variable: impl Fn(&str) -> Option<String>, name: &str) -> String {
    variable(name).unwrap_or_default()
}

fn invalid(message: impl Into<String>) -> CniError {
    CniError::new(code::INVALID_ENVIRONMENT, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Vec<(&'static str, &'static str)> {
        vec![
            ("CNI_CONTAINERID", "0a-b_c.d"),
            ("CNI_IFNAME", "eth0"),
            ("CNI_NETNS", "/run/netns/x"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1;\
                 K8S_POD_INFRA_CONTAINER_ID=x",
            ),
        ]
    }

    fn read(
        command: Command,
        variables: &[(&'static str, &'static str)],
    ) -> Result<Environment, CniError> {
        Environment::read(command, |name| {
            variables
                .iter()
                .rev()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    #[test]
    fn reads_all() {
        let environment = read(Command::Add, &good()).unwrap();
        assert_eq!(
            environment,
            Environment {
                container_id: "0a-b_c.d".into(),
                ifname: "eth0".into(),
                netns: "/run/netns/x".into(),
                pod_namespace: "shop".into(),
                pod_name: "web-0".into(),
                pod_uid: "u-1".into(),
            }
        );
    }

    #[test]
    fn names_what_is_wrong() {
        for (name, value, expected) in [
            ("CNI_CONTAINERID", "", "CNI_CONTAINERID is not set"),
            ("CNI_CONTAINERID", "-x", "CNI_CONTAINERID \"-x\""),
            ("CNI_CONTAINERID", "../x", "CNI_CONTAINERID"),
            ("CNI_CONTAINERID", "a/b", "CNI_CONTAINERID"),
            ("CNI_CONTAINERID", "é", "CNI_CONTAINERID"),
            ("CNI_IFNAME", "", "CNI_IFNAME is not set"),
            ("CNI_IFNAME", "abcdefghijklmnop", "has 16 bytes"),
            ("CNI_IFNAME", "..", "CNI_IFNAME \"..\" is no interface name"),
            ("CNI_IFNAME", "a/b", "CNI_IFNAME \"a/b\""),
            ("CNI_IFNAME", "a:b", "CNI_IFNAME"),
            ("CNI_IFNAME", "a b", "CNI_IFNAME"),
            ("CNI_NETNS", "", "CNI_NETNS is not set"),
            ("CNI_ARGS", "K8S_POD_NAME", "CNI_ARGS has \"K8S_POD_NAME\""),
        ] {
            let mut variables = good();
            variables.push((name, value));
            let error = read(Command::Add, &variables).unwrap_err();
            assert_eq!(error.code, code::INVALID_ENVIRONMENT, "{name}={value}");
            assert!(error.message.contains(expected), "{}", error.message);
        }
    }

    #[test]
    fn del_needs_no_namespace() {
        let mut variables = good();
        variables.push(("CNI_NETNS", ""));
        assert_eq!(read(Command::Del, &variables).unwrap().netns, "");
    }

    #[test]
    fn tells_commands_apart() {
        let with = |value: &'static str| command(move |_| Some(value.to_owned()));
        assert_eq!(with("ADD").unwrap(), Command::Add);
        assert_eq!(with("DEL").unwrap(), Command::Del);
        assert_eq!(with("VERSION").unwrap(), Command::Version);
        for (value, expected) in [
            ("", "CNI_COMMAND is not set"),
            ("CHECK", "CNI_COMMAND CHECK is not supported"),
            ("GC", "CNI_COMMAND GC is not supported"),
            ("STATUS", "CNI_COMMAND STATUS is not supported"),
            ("add", "CNI_COMMAND \"add\" is unknown"),
        ] {
            let error = with(value).unwrap_err();
            assert_eq!(error.code, 4);
            assert!(error.message.contains(expected), "{}", error.message);
        }
    }
}
