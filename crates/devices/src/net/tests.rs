use super::*;

#[test]
fn nic_options_are_understood() {
    let spec: NicSpec = "user,mac=52:54:00:aa:bb:cc,forward=tcp:2222:22,forward=udp:53:5353".parse().unwrap();
    assert_eq!(spec.mac.unwrap().to_string(), "52:54:00:aa:bb:cc");
    let Network::User { forwards } = spec.network else { panic!() };
    assert_eq!(forwards, [Forward { udp: false, host: 2222, guest: 22 }, Forward { udp: true, host: 53, guest: 5353 }]);
    assert_eq!("tap:vm0".parse::<NicSpec>().unwrap().network, Network::Tap("vm0".into()));
    assert_eq!("none".parse::<NicSpec>().unwrap().network, Network::None);
}

#[test]
fn wrong_nic_options_are_named() {
    for (text, word) in [
        ("bridge", "bridge"),
        ("tap:", "tap:"),
        ("user,mac=1", "'1'"),
        ("user,mac=01:00:00:00:00:00", "group"),
        ("user,speed=9", "speed=9"),
        ("tap:x,forward=tcp:1:2", "forward="),
        ("user,forward=tcp:99999:2", "tcp:99999:2"),
    ] {
        let error = text.parse::<NicSpec>().unwrap_err();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn a_missing_tap_says_how_to_make_it() {
    let error = Tap::open("pvbus-none0").err().unwrap().to_string();
    assert!(error.contains("ip tuntap add pvbus-none0 mode tap"), "{error}");
}
