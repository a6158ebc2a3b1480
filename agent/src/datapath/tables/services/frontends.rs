//! What leads to a Service port: rows of `FRONTENDS_*`, who owns each, and who else wants it.

use std::{collections::BTreeSet, io, net::IpAddr};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    Ipv4, Ipv6, Port as PortNumber,
    service::{self, FrontendKey},
};

use super::{
    super::{Ipcache, TableError, io_error, is_full},
    FRONTENDS_V4, FRONTENDS_V6, Port, Services,
};
use crate::model::{FrontendKind, ServicePort, ServicePortKey};

/// A frontend of either family as its map's key has it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(in super::super) struct FrontendAddress {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
    pub scope: u8,
}

pub(super) fn frontends_of(
    key: &ServicePortKey,
    desired: &ServicePort,
) -> BTreeSet<FrontendAddress> {
    desired
        .frontends
        .iter()
        .map(|frontend| FrontendAddress {
            address: frontend.address,
            port: frontend.port,
            protocol: key.protocol.number(),
            scope: match frontend.kind {
                FrontendKind::ClusterIp => service::scope::INSIDE,
            },
        })
        .collect()
}

impl Services {
    pub(super) fn update_frontends(
        &mut self,
        port: &mut Port,
        wanted: BTreeSet<FrontendAddress>,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        for &frontend in &wanted {
            if !port.frontends.contains(&frontend) {
                self.claim(frontend, port.number, ipcache)?;
                port.frontends.insert(frontend);
            }
        }
        self.drop_found(port, &wanted)?;
        let unwanted: Vec<FrontendAddress> = port.frontends.difference(&wanted).copied().collect();
        for frontend in unwanted {
            self.release(frontend, port.number, ipcache)?;
            port.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Deletes the frontends that were found at start and that the port does not want. Those that
    /// cannot be deleted stay noted, and so are tried again.
    pub(super) fn drop_found(
        &mut self,
        port: &mut Port,
        wanted: &BTreeSet<FrontendAddress>,
    ) -> Result<(), TableError> {
        let (number, claimed) = (port.number, &port.frontends);
        let mut failed = None;
        port.found.retain(|frontend| {
            if wanted.contains(frontend) || claimed.contains(frontend) {
                return false;
            }
            if self.owners.get(frontend) != Some(&number) {
                // Another port has claimed it; it is not to come back.
                if let Some(others) = self.waiting.get_mut(frontend) {
                    others.retain(|&other| other != number);
                }
                return false;
            }
            match self.frontends.delete(*frontend) {
                Ok(()) => {
                    self.owners.remove(frontend);
                    false
                }
                Err(error) => {
                    failed.get_or_insert(error);
                    true
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// Makes a frontend lead to port `number`. Another port that wants it too waits.
    pub(super) fn claim(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        ipcache.add_frontend(frontend.address)?;
        let owner = self.owners.get(&frontend).copied();
        if owner == Some(number) {
            return Ok(());
        }
        if let Err(error) = self.frontends.insert(frontend, number) {
            ipcache.undo_add_frontend(frontend.address);
            return Err(error);
        }
        self.owners.insert(frontend, number);
        if let Some(owner) = owner.filter(|owner| !self.orphans.contains_key(owner)) {
            self.waiting.entry(frontend).or_default().push(owner);
        }
        Ok(())
    }

    /// Gives a frontend up; a port that waits for it gets it in the same update.
    pub(super) fn release(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        let mut others = self.waiting.remove(&frontend).unwrap_or_default();
        if self.owners.get(&frontend) == Some(&number) {
            let (result, owner) = match others.last().copied() {
                Some(next) => (self.frontends.insert(frontend, next), Some(next)),
                None => (self.frontends.delete(frontend), None),
            };
            if result.is_err() {
                if !others.is_empty() {
                    self.waiting.insert(frontend, others);
                }
                return result;
            }
            match owner {
                Some(owner) => {
                    others.pop();
                    self.owners.insert(frontend, owner);
                }
                None => {
                    self.owners.remove(&frontend);
                }
            }
        } else {
            others.retain(|&other| other != number);
        }
        if !others.is_empty() {
            self.waiting.insert(frontend, others);
        }
        ipcache.remove_frontend(frontend.address)
    }
}

/// Both maps of frontends.
#[derive(Debug)]
pub(in super::super) struct FrontendMaps {
    pub v4: BpfHashMap<MapData, FrontendKey<Ipv4>, u32>,
    pub v6: BpfHashMap<MapData, FrontendKey<Ipv6>, u32>,
    pub max: u32,
}

impl FrontendMaps {
    fn insert(&mut self, frontend: FrontendAddress, number: u32) -> Result<(), TableError> {
        let row = service::state_row(number, service::endpoint_set::CLUSTER);
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.insert(key, row, 0))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.insert(key, row, 0))
            }
        };
        result.map_err(io_error).map_err(|error| {
            if is_full(&error) {
                TableError::Full {
                    map,
                    entries: self.max,
                    remedy: "raise the setting services-max",
                }
            } else {
                TableError::kernel(map, frontend, error)
            }
        })
    }

    fn delete(&mut self, frontend: FrontendAddress) -> Result<(), TableError> {
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.remove(&key))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.remove(&key))
            }
        };
        match result.map_err(io_error) {
            Err(error) if !is_absent(&error) => Err(TableError::kernel(map, frontend, error)),
            _ => Ok(()),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

impl FrontendAddress {
    fn key<A>(self, address: A) -> FrontendKey<A> {
        FrontendKey {
            address,
            port: PortNumber::new(self.port),
            protocol: self.protocol,
            scope: self.scope,
        }
    }
}

impl std::fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = weir_common::protocol::name(self.protocol).unwrap_or("?");
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:{}/{protocol}", self.port),
            IpAddr::V6(v6) => write!(f, "[{v6}]:{}/{protocol}", self.port),
        }
    }
}
