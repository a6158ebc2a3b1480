//! ADD and DEL: the order of their steps, and how a failed ADD is undone.

use crate::{
    agent::{Agent, NotAllocated, Reservation},
    configuration::Configuration,
    environment::Environment,
    error::CniError,
    netns::Netns,
    output, wiring,
};

/// ADD. Returns the result for standard output.
///
/// # Errors
///
/// See [`crate::error::code`]; nothing of this call is left then, as far as it could be undone.
pub async fn add(
    configuration: &Configuration,
    environment: &Environment,
) -> Result<String, CniError> {
    let netns = Netns::open(&environment.netns)?;
    let mut agent =
        Agent::connect(&configuration.agent_socket, configuration.agent_timeout).await?;
    let reservation = match agent
        .allocate(environment, &configuration.port_mappings)
        .await
    {
        Ok(reservation) => reservation,
        Err(NotAllocated {
            error,
            may_be_reserved: false,
        }) => return Err(error),
        Err(NotAllocated { error, .. }) => {
            let undone = agent.release(environment).await;
            return Err(error.and(undone.err().as_slice()));
        }
    };
    let mut host_ifindex = None;
    match wire(
        &mut agent,
        environment,
        &reservation,
        &netns,
        &mut host_ifindex,
    )
    .await
    {
        Ok(()) => Ok(output::success(
            configuration.version,
            &reservation,
            &environment.ifname,
            &environment.netns,
        )),
        Err(error) => {
            let mut failures = Vec::new();
            if let Some(index) = host_ifindex {
                failures.extend(wiring::delete(index).err());
            }
            failures.extend(agent.release(environment).await.err());
            Err(error.and(&failures))
        }
    }
}

async fn wire(
    agent: &mut Agent,
    environment: &Environment,
    reservation: &Reservation,
    netns: &Netns,
    host_ifindex: &mut Option<u32>,
) -> Result<(), CniError> {
    let index = wiring::create(reservation, &environment.ifname, netns)?;
    *host_ifindex = Some(index);
    let alias = wiring::alias(&environment.container_id, &environment.ifname);
    // The host's side first: a veth that comes up when its peer is up has a carrier at once, and it is
    // the pod's side that must not wait for one.
    wiring::configure_host(reservation, index, alias)?;
    let cookie = wiring::configure_pod(reservation, &environment.ifname, netns)?;
    agent.commit(environment, index, cookie).await
}

/// DEL. Returns what could not be done and is left to others, for the log.
///
/// # Errors
///
/// Code 5 if an interface of ours exists and cannot be deleted.
pub async fn del(
    configuration: &Configuration,
    environment: &Environment,
) -> Result<Vec<CniError>, CniError> {
    let mut notes = Vec::new();
    let timeout = configuration.agent_timeout_del();
    let released = match Agent::connect(&configuration.agent_socket, timeout).await {
        Ok(mut agent) => agent.release(environment).await,
        // A DEL succeeds without the agent: nobody tries again.
        Err(error) => Err(CniError::new(error.code, error.message)),
    };
    // The agent finds vanished pods by itself, when it runs again.
    let look_at_all = released.is_err();
    notes.extend(released.err());

    // A namespace that is gone took its interfaces along; a path that leads elsewhere by now is no
    // concern of this container's.
    let netns = match environment.netns.as_str() {
        "" => None,
        path => Netns::open(path).ok(),
    };
    let alias = wiring::alias(&environment.container_id, &environment.ifname);
    let found = wiring::find_host_side(&alias, &environment.ifname, netns.as_ref(), look_at_all)?;
    if let Some(index) = found {
        wiring::delete(index)?;
    }
    Ok(notes)
}
